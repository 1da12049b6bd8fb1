"""Floor 1: text to batches. `data.dataset.open_data` is the one door.

data = open_data(config.data, config.model.vocab_size, workdir, seed=config.seed)
print(data.summary)                                  # data.summary.fingerprint: keep it in the checkpoint
rows = local_rows(mesh, spec, config.data.batch_size)    # the rows that this process's devices hold
with data.train(start_step=step, rows=rows) as loader:   # batch k is a function of (seed, k) alone
    for batch in device_batches(loader, mesh, spec):     # dict of int32 [B, T] global arrays
        ...
loader.seconds_blocked                               # seconds the caller waited for data
for batch in device_batches(data.held_out(config.eval.batches, rows=rows), mesh, spec):
    ...                                              # data.tokenizer.token_bytes() gives bits per byte
"""
