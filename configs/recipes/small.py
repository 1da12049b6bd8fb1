"""A smaller model in three stages: fewer channels, recovery by distillation, codes of 4 bits.

    python train.py --config=benchmarks/dense.py --workdir=runs/dense
    python -m compress recipe --workdir=runs/dense --out=runs/recipe \
        --recipe=configs/recipes/small.py

A stage is a method of `python -m compress` with its flags, or `train` with keys of the config: it
begins from the stage before, with the dense run's data and settings where none are given.
"{dense}" stands for that run's folder, "{previous}" for the last stage's.
"""


def get_config() -> tuple[tuple[str, dict[str, object]], ...]:
    """The stages in order."""
    return (
        ("shrink", {"mlp_dim": 512}),  # of 768
        (
            "train",
            {
                "distill.teacher": "{dense}",
                "train.steps": 100,
                "optimizer.learning_rate": 5e-4,
                "optimizer.warmup_steps": 10,
            },
        ),
        ("quantize", {"form": "int4:128", "method": "gptq"}),
    )
