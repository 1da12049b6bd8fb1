"""Floor 1: text and images to batches. `data.dataset.open_data` is the one door.

    data = open_data(
        config.data, config.model.vocab_size, workdir, seed=config.seed, objective=config.objective
    )
    print(data.summary)                                     # its fingerprint goes in checkpoints
    rows = local_rows(mesh, spec, config.data.batch_size)   # that this process's devices hold
    with data.train(step, rows=rows) as loader:             # batch k: a function of (seed, k) alone
        for batch in device_batches(loader, mesh, spec):    # dict of global arrays
            ...
    loader.seconds_blocked                                  # seconds that the caller waited
    with data.held_out(config.eval.batches, rows=rows) as loader:
        for batch in device_batches(loader, mesh, spec):    # the same batches every time
            ...                                             # bytes: data.tokenizer.token_bytes()

The arrays of a batch are those of the objective: docs/objectives.md has them.

`mesh` and `spec` (of the two dims batch and seq) come from the caller: no mesh axis is named here.
"""
