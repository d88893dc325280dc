"""Every setting of a run: its type, default, unit and range. Defaults live in this room and nowhere else.

A recipe (YAML) is one `Config`; command-line flags override single fields. `None` means "what the model was made
for" and is filled in before a run starts, so the `config.yaml` in a run folder is complete and reruns as it is.
"""

from typing import Any, Literal

from pydantic import model_validator

from cogvideox_factory.config.data import Cache, Data, DataSet, Text
from cogvideox_factory.config.generation import Generate, Sampling
from cogvideox_factory.config.laws import problems_of
from cogvideox_factory.config.section import Section
from cogvideox_factory.config.start import MindSpore, Model, Run
from cogvideox_factory.config.training import Lora, Parallel, Train, Vae, Validation

__all__ = ["Cache", "Config", "Data", "DataSet", "Generate", "Lora", "MindSpore", "Model", "Parallel", "Run",
           "Sampling", "Text", "Train", "Vae", "Validation"]  # fmt: skip


class Config(Section):
    """One complete run."""

    task: Literal["t2v", "i2v"] = "t2v"
    """t2v: text to video. i2v: text and a first image to video."""
    engine: Literal["torch", "mindspore"] = "torch"
    """What computes: PyTorch, or MindSpore (needs the extra of that name)."""
    model: Model = Model()
    data: Data = Data()
    cache: Cache = Cache()
    vae: Vae = Vae()
    text: Text = Text()
    lora: Lora = Lora()
    train: Train = Train()
    parallel: Parallel = Parallel()
    sampling: Sampling = Sampling()
    validation: Validation = Validation()
    generate: Generate = Generate()
    mindspore: MindSpore = MindSpore()
    run: Run = Run()

    @model_validator(mode="after")
    def _laws_across_fields(self) -> "Config":
        if problems := problems_of(self):
            raise ValueError("; ".join(problems))
        return self

    @property
    def data_sets(self) -> list[dict[str, Any]]:
        """Every data set as plain values: one without a name for `data.root`, or all of `data.sets`, complete."""
        data, is_i2v = self.data, self.task == "i2v"
        columns = {"caption_column": data.caption_column, "video_column": data.video_column}
        columns["image_column"] = data.image_column
        named: list[dict[str, Any]] = [
            {name: value for name, value in part.model_dump().items() if value is not None} | {"name": part.called}
            for part in data.sets
        ]
        lists = {"table": data.table, "captions": data.captions, "videos": data.videos}
        alone = [{"name": "", "weight": 1.0, "root": data.root, **lists}] if data.root else []
        sets = [dict.fromkeys(lists) | columns | part for part in named or alone]
        return [part if is_i2v else part | {"image_column": None} for part in sets]
