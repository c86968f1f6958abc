"""What a run prints before it begins, in the form LibMTL's users know."""

from __future__ import annotations

from fastmtl.data import DataBundle
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.trainer.run.directory import RunDirectory
from fastmtl.trainer.run.settings import print_settings

__all__ = ["print_banner"]


def print_banner(config: TrainConfig, bundle: DataBundle, run: RunDirectory) -> None:
    """Print the configuration of a run, by part."""
    rows = ", ".join(f"{count:,} {split}" for split, count in bundle.rows.items())
    general = {
        "Mode": "train",
        "Weighting": config.weighting,
        "Architecture": config.arch,
        "Rep_Grad": config.rep_grad,
        "Multi_Input": config.multi_input,
        "Seed": config.seed,
        "Run Directory": run.path,
        "Load Path": config.load_path,
        "Device": config.device or "auto",
        "Compile": config.compile,
    }
    data = {"Data Set": f"{bundle.name} ({rows})", "Encoder": bundle.encoder, "Batch Size": config.batch_size}
    print_settings(
        [
            ("General", general),
            ("Data", data),
            (config.weighting, config.weight_args),
            (config.arch, config.arch_args),
            ("Optimizer", config.optim_param),
            ("Scheduler", config.scheduler_param),
        ]
    )
    print("=" * 40)
