"""Options that several commands share."""

from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help=".pt2, .pt/.pth, .safetensors or a run directory", metavar="MODEL")
]
TargetName = Annotated[
    str | None, typer.Option("--target", help="a name of `edgeprune list targets`, or a .toml file")
]
Arch = Annotated[
    str | None, typer.Option(help="timm:NAME, torchvision:NAME, package.module:callable, file.py:callable")
]
Input = Annotated[str | None, typer.Option("--input", help="the shape of one image", metavar="CxHxW")]
Mean = Annotated[str | None, typer.Option(help="per channel, of pixels in [0, 1]", metavar="R,G,B")]
Std = Annotated[str | None, typer.Option(help="per channel, of pixels in [0, 1]", metavar="R,G,B")]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow-class", help="a class that a pickle may make", metavar="PKG.CLASS"),
]
Trust = Annotated[
    bool, typer.Option("--trust-pickle", help="run whatever code the pickle holds; the last resort")
]
TrustRun = Annotated[
    bool,
    typer.Option(
        "--trust-run",
        help="the run directory is by you or by whom you trust: import the code that its recipe names, "
        "and go on from weights that were made elsewhere",
    ),
]
Data = Annotated[str | None, typer.Option(help="class folders, a tar of them, or an .npz", metavar="PATH")]
TrainingData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="class folders, a tar of them, or an .npz; without it the network is all that is used",
        metavar="PATH",
    ),
]
DataUse = Annotated[
    str | None,
    typer.Option(help="evaluate: measure on it and learn nothing from it", metavar="all|evaluate"),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="a name of `edgeprune list methods`; auto is taylor with training images, data-free without"
    ),
]
DeviceUrls = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="where to measure; several measure side by side, and the first decides",
        metavar="URL",
    ),
]
Attacked = Annotated[str | None, typer.Option("--attack", metavar="none|fgsm|pgd|standard")]
Eps = Annotated[str | None, typer.Option(help="radius of the attack", metavar="8/255")]
Limit = Annotated[int | None, typer.Option(help="so many images, all classes alike; 0: all", metavar="N")]
Seed = Annotated[int | None, typer.Option(help="every random choice follows from it")]
OutputName = Annotated[
    str | None,
    typer.Option("--output", help="the output of an .onnx file that has the logits", metavar="NAME"),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout and nothing else")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="any key of the recipe", metavar="TABLE.KEY=VALUE")
]
Budgets = Annotated[
    list[str] | None, typer.Option("--budget", help='as in "macs=50 %" or "latency_p50=5 ms"')
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def model_table(
    path: str,
    arch: str | None,
    input_shape: str | None,
    mean: str | None,
    std: str | None,
    allow_class: list[str] | None,
    trust_pickle: bool,
) -> dict[str, Any]:
    """The recipe's table [model] from the options."""
    return {
        "path": path,
        "arch": arch,
        "input": input_shape,
        "mean": mean,
        "std": std,
        "allow_class": allow_class,
        "trust_pickle": trust_pickle or None,
    }


def only_given(model: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """Only what was given on the command line."""
    given = {"model": model, **tables}
    out: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if v is not None}
            if kept:
                out[key] = kept
        elif value is not None:
            out[key] = value
    return out
