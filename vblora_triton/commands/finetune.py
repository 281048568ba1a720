"""`vblora-triton finetune`: its options."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from vblora_triton.commands.parsing import add_command, rate, whole_number
from vblora_triton.methods import methods

_DESCRIPTION = """\
Fine-tune a causal language model on text with {titles}, then save the adapter, reload it, merge it, and check
that all of them compute the same.

Without --model, a small byte-level Llama is first trained from scratch on English text that comes with Python, and
without --data it is adapted to Python source code that comes with Python: nothing is downloaded, and it takes a few
minutes on a laptop. The end of the text (a tenth, at most 256 sequences) is held out to measure the loss on."""

_EPILOG = """\
written to the output folder:
  adapter/        the whole adapter: to train further, to use, to merge
{forms}
  base/           the base model, where it was trained here
  report.json     the numbers of the table
  loss.png        the losses, where matplotlib is installed

examples:
  vblora-triton finetune --output build/demo
  vblora-triton finetune --data notes.txt --steps 500 --output notes
  vblora-triton finetune --model ./my-llama --data train.txt --target-modules q_proj v_proj --output out
  vblora-triton finetune --model ./my-chat --data chats.jsonl --checkpoint-every 100 --output out
  torchrun --nproc-per-node 4 -m vblora_triton finetune --model ./my-llama --data train.txt --output out

The exit code is 0 when the results are written, 2 when something asked for cannot be done (nothing is written but
checkpoints), 130 after Ctrl-C or SIGTERM."""


def _targets(values: list[str]) -> str | tuple[str, ...]:
    """Tell names apart from what is written as one string: "all-linear" or a regular expression."""
    if values == ["all-linear"] or (len(values) == 1 and not re.fullmatch(r"[\w.]+", values[0])):
        return values[0]
    return tuple(values)


# group -> option -> its settings for argparse, of the options that are no method's; the order is that of --help.
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "what to train on what": {
        "--model": {
            "metavar": "DIR|ID",
            "help": "a causal language model: a directory written by save_pretrained, or a hub id "
            "(default: a small one made on the spot)",
        },
        "--data": {
            "nargs": "+",
            "default": [],
            "metavar": "FILE",
            "help": "UTF-8 text files; or, by the suffix .jsonl, a JSON object a line with `text`, `messages` (chat), "
            "or `prompt` and `completion`, of which only the answers are learned (default: Python source)",
        },
        "--eval-data": {
            "nargs": "+",
            "default": [],
            "metavar": "FILE",
            "help": "such files to measure the loss on (default: the end of --data, which is held out)",
        },
        "--output": {
            "required": True,
            "metavar": "DIR",
            "help": "folder for the results; made if need be, and only earlier results in it are replaced",
        },
        "--config": {
            "metavar": "FILE",
            "help": "options in a file, YAML or .json, such as `steps: 500`; those of the command line win",
        },
    },
    "the adapter": {
        "--target-modules": {
            "nargs": "+",
            "default": ["all-linear"],
            "metavar": "NAME",
            "help": "names of the layers to adapt, such as q_proj v_proj; or one regular expression for whole names; "
            "or all-linear, all but the output head (default: all-linear)",
        },
    },
    "the training": {
        "--steps": {"type": whole_number(1), "default": 250, "metavar": "N", "help": "default: %(default)s"},
        "--batch-size": {
            "type": whole_number(1),
            "default": 16,
            "metavar": "N",
            "help": "sequences in a step (default: %(default)s)",
        },
        "--seq-len": {
            "type": whole_number(2),
            "default": 128,
            "metavar": "N",
            "help": "tokens in a sequence (default: %(default)s)",
        },
        "--seed": {
            # The generators' range: numpy's, which Trainer seeds too, is the narrowest.
            "type": whole_number(0, 2**32 - 1),
            "default": 0,
            "metavar": "N",
            "help": "the same seed gives the same run on the same machine (default: %(default)s)",
        },
        # How long the small default model is trained; for tests, which have no use for a good one.
        "--pretraining-steps": {"type": whole_number(1), "default": 150, "help": argparse.SUPPRESS},
        "--lr": {
            "type": rate,
            "metavar": "LR",
            "help": "one learning rate for all parts of the adapter, where theirs is not given",
        },
        "--checkpoint-every": {
            "type": whole_number(1),
            "metavar": "N",
            "help": "keep a checkpoint of every N steps, in DIR/checkpoints until the run ends well (default: none)",
        },
        "--resume": {"action": "store_true", "help": "go on from the newest checkpoint of such a run in DIR"},
        "--report-to": {
            "nargs": "+",
            "default": [],
            "metavar": "NAME",
            "help": "what Trainer reports the losses to, such as tensorboard (in DIR/runs), wandb or mlflow",
        },
    },
    "the machine": {
        "--backend": {
            "choices": ["auto", "triton", "cpu", "reference"],
            "default": "auto",
            "help": "triton: the fused kernels, on a GPU; cpu: PyTorch with gradients written out; reference: PyTorch "
            "as plain as can be; auto: the kernels where they run, elsewhere PyTorch (default: %(default)s)",
        },
        "--dtype": {
            "choices": ["float32", "bfloat16", "float16"],
            "help": "of the base model; adapters are always float32 (default: float32; bfloat16 for --model on a GPU)",
        },
        "--load-in-4bit": {
            "action": "store_true",
            "help": "quantise the base model to 4 bits (nf4) when it is loaded; needs bitsandbytes",
        },
    },
}


def _own_options(kind: str) -> dict[str, dict[str, Any]]:
    """Return option -> its settings for argparse, of all methods' "options" or "rates"; one they share stands once."""
    settings: dict[str, dict[str, Any]] = {}
    for name, method in methods().items():
        for field, option in getattr(method, kind).items():
            small = "" if option.small is None else f"; {option.small:g} for the small default model"
            help = f"{name}: {option.help} (default: {option.default_help or format(option.default, 'g')}{small})"
            setting = settings.setdefault(f"--{field.replace('_', '-')}", {"metavar": option.metavar})
            setting["type"] = rate if kind == "rates" else whole_number(option.minimum, option.maximum)
            setting["help"] = f"{setting['help']}; {help}" if "help" in setting else help
    return settings


def add_to(commands: Any) -> None:
    """Declare the options of `vblora-triton finetune`."""
    titles = [method.title for method in methods().values()]
    forms = (
        f"  {form.folder}/   {method.title}'s {form.help}"
        for method in methods().values()
        for form in method.forms
        if form.key != "full"
    )
    parser = add_command(
        commands,
        "finetune",
        run,
        help="fine-tune a model on text, save, reload, merge and compare",
        description=_DESCRIPTION.format(titles=" or ".join(titles)),
        epilog=_EPILOG.format(forms="\n".join(forms)),
    )
    own = {
        "the adapter": {"--method": {"choices": list(methods()), "default": "vblora", "help": "default: %(default)s"}}
        | _own_options("options"),
        "the training": _own_options("rates"),
    }
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, settings in (options | own.get(title, {})).items():
            group.add_argument(name, **settings)


def run(options: dict[str, Any]) -> int:
    """Fine-tune; see `vblora_triton.finetune.finetune`."""
    # The parser has read it.
    options.pop("config")
    options["target_modules"] = _targets(options["target_modules"])
    for name in ("data", "eval_data", "report_to"):
        options[name] = tuple(options[name])
    # Not at the top: --help and a mistyped option need not wait for transformers.
    from vblora_triton.finetune import Options, finetune
    from vblora_triton.finetune.checkpoints import newest
    from vblora_triton.finetune.output import stamp
    from vblora_triton.finetune.processes import is_main, terminated_like_interrupted

    before = stamp(options["output"])
    try:
        with terminated_like_interrupted():
            finetune(Options(**options))
    except KeyboardInterrupt:
        written = "nothing was written" if stamp(options["output"]) == before else "all results had been written"
        checkpoint = newest(Path(options["output"]).expanduser())
        kept = f"; {checkpoint} is kept, and --resume goes on from it" if checkpoint else ""
        if is_main():
            print(f"vblora-triton finetune: interrupted; {written}{kept}", file=sys.stderr)
        return 130
    return 0
