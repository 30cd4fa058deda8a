"""Mistakes that a person makes, and what the command answers: one table for the tests and for the page of messages.

Each row is typed in a folder that holds ``FILES`` and nothing else. ``docs/make_messages.py`` writes the answers to
``docs/reference/messages.md``; ``tests/commands/test_mistakes.py`` tests each row, and that the page has its answer.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

FILES: dict[str, bytes] = {
    "broken.yaml": b"model: [1, 2\n  x: }",
    "text.yaml": b"just some text",
    "empty.yaml": b"",
    "latin.yaml": b"name: \xe9t\xe9\n",
    "key.yaml": b"model:\n  jacobians: {max_pol: 1}\n",
    "group.yaml": b"modle:\n  backbone: paper/lenet5\n",
    "choice.yaml": b"trainer:\n  callbacks:\n    - class_path: nslightning.callbacks.GradientDivergence\n"
    b"      init_args: {choices: {odd: {max_pool: minmal}}}\n",
    "field.yaml": b"trainer:\n  callbacks:\n    - class_path: nslightning.callbacks.GradientDivergence\n"
    b"      init_args: {choices: {odd: {rleu: 1}}}\n",
    "class.yaml": b"trainer:\n  callbacks:\n    - class_path: nslightning.callbacks.GradientDiverg\n",
    "one.yaml": b"trainer:\n  callbacks: GradientDivergence\n",
    "number.yaml": b"trainer:\n  callbacks: 3\n",
    "tab.yaml": b"model:\n\tbackbone: paper/lenet5\n",
    "argument.yaml": b"data:\n  class_path: MNIST\n  init_args: {batch_sise: 2}\n",
    "null.yaml": b"model:\n  jacobians: null\n",
    "rule.yaml": b"model:\n  sites: [{operatoin: relu, relu: 1}]\n",
    "three.yaml": b"trainer: 3\n",
    "list.yaml": b"model: {jacobians: [1]}\n",
    "fixed.yaml": b"kind: train\nfixed: 3\nscales: {smoke: {}}\n",
    "scales.yaml": b"kind: train\nscales: {smoke: {epochs: 3}}\nfixed: {backbone: paper/fc}\n",
    "scale.yaml": b"kind: train\nscales: {smoek: {}}\nfixed: {backbone: paper/fc}\n",
    "twice.yaml": b"model:\n  backbone: paper/lenet5\nmodel:\n  pretrained: false\n",
    "bad.ckpt": b"hello",
    "plain.txt": b"hello\n",
    "nets.py": b"def make():\n    return missing\n\n\nnumber = 3\n",
    "grid.yaml": b"kind: train\nscales: {smoke: {}}\nfixed: {backbone: paper/fc, epoch: 3}\n",
    "a folder/note.txt": b"nothing\n",
    "photos/train/cat/1.txt": b"",
    "photos/val/cat/1.txt": b"",
}


@dataclass(frozen=True)
class Mistake:
    """One row.

    Args:
        typed: The command line after ``nslightning``.
        says: Words that the answer must contain.
        status: The exit status.
    """

    typed: str
    says: tuple[str, ...]
    status: int = 2


def after_config(*rows: tuple[str, tuple[str, ...]]) -> list[Mistake]:
    """Mistakes after a good config."""
    return [Mistake(f"fit --config configs/quickstart.yaml {typed}", says) for typed, says in rows]


#: By sections of the page.
MISTAKES: dict[str, list[Mistake]] = {
    "Commands and options": [
        Mistake("fti", ("no command 'fti'", "did you mean 'fit'")),
        Mistake("fit", ("--data is needed", "configs/quickstart.yaml")),
        Mistake("fit --model.backbone=paper/lenet5", ("--data is needed", "--data=MNIST")),
        Mistake("fit configs/quickstart.yaml", ("stands alone", "did you mean '--config configs/quickstart.yaml'")),
        Mistake("fit --help=al", ("--help=al", "--help=all")),
        Mistake("validate bad.ckpt", ("bad.ckpt stands alone", "did you mean '--ckpt_path=bad.ckpt'")),
        Mistake("fit --config", ("--config names a YAML file",)),
        Mistake("fit --config=", ("--config= names no file", "configs/quickstart.yaml")),
        Mistake("fit --config -", ("there is no file -",)),
        Mistake("--version --verbos", ("--version takes --verbose",)),
        Mistake("--print-completion fish", ("bash, zsh, tcsh",)),
        *after_config(
            (
                "model.backbone=paper/lenet5",
                ("an option begins with --", "did you mean '--model.backbone=paper/lenet5'"),
            ),
            ("paper/lenet5", ("stands alone", "did you mean '--model.backbone=paper/lenet5'")),
            ("--modle.backbone=x", ("no option --modle.backbone", "did you mean '--model.backbone'")),
            ("--model.backbne=x", ("did you mean '--model.backbone'",)),
            ("--bakcbone=x", ("did you mean '--model.backbone'",)),
            ("--ckpt-pth=last", ("did you mean '--ckpt_path'",)),
            ("--model.num_classes=3", ("--model.num_classes", "data.num_classes")),
            ("--seed_everything=abc", ("--seed_everything=abc", "a whole number")),
            ("--seed_everything=-1", ("--seed_everything=-1", "from 0 to")),
            ("--name=../elsewhere", ("--name=../elsewhere",)),
            ("--task=video", ("--task=video", "--task=images")),
            ("--output", ("--output",)),
            ("--output=bad.ckpt", ("bad.ckpt is a file, and a folder is needed", "--output=FOLDER")),
            ("--arithmetic=bias_frist", ("bias_frist", "bias_last, sequential", "did you mean 'bias_last'")),
            ("--arithmetic=tf23", ("'tf23'", "did you mean 'tf32'")),
            ("--output=", ("--output= names no folder", "for runs")),
            ("--seed_everything=1.5", ("--seed_everything=1.5", "a whole number")),
            ("--name=.", ("--name=.", "one folder in --output=runs")),
        ),
    ],
    "Config files": [
        *after_config(
            ("--config nothere.yaml", ("there is no file nothere.yaml", "lists them")),
            ("--config configs/quikstart.yaml", ("did you mean 'quickstart'",)),
            ("--config broken.yaml", ("broken.yaml, line 2", "not YAML")),
            ("--config text.yaml", ("text.yaml", "just some text", "mapping")),
            ("--config empty.yaml", ("empty.yaml is empty",)),
            ("--config latin.yaml", ("latin.yaml, line 1: byte 0xe9", "UTF-8")),
            ("--config 'a folder'", ("--config=a folder", "it is a folder, and a YAML file is needed")),
            ("--config three.yaml", ("--trainer=3 is not a mapping",)),
            ("--config list.yaml", ("--model.jacobians=[1] is not a choice",)),
            ("--config twice.yaml", ("twice.yaml, line 3: model is given twice, first in line 1",)),
            ("--config key.yaml", ("--model.jacobians.max_pol", "did you mean '--model.jacobians.max_pool'")),
            ("--config group.yaml", ("--modle.backbone", "did you mean '--model.backbone'")),
            ("--config class.yaml", ("GradientDiverg'", "did you mean 'GradientDivergence'")),
            ("--config one.yaml", ("GradientDivergence needs choices: give --trainer.callbacks.choices=",)),
            ("--config number.yaml", ("--trainer.callbacks=3 is not allowed; expected a list or Callback",)),
            ("--config tab.yaml", ("tab.yaml, line 2", "not YAML")),
            ("--config argument.yaml", ("--data.batch_sise", "did you mean '--data.batch_size'")),
        ),
    ],
    "Jacobian choices": after_config(
        ("--model.jacobian.relu=1", ("--model.jacobian.relu", "did you mean '--model.jacobians.relu'")),
        ("--model.jacobians.rleu=1", ("did you mean '--model.jacobians.relu'",)),
        ("--model.alpha=1", ("did you mean '--model.jacobians.relu'",)),
        ("--model.beta=1", ("did you mean '--model.jacobians.max_pool'",)),
        ("--model.jacobians.relu=abc", ("--model.jacobians.relu=abc", "a number or random")),
        ("--model.jacobians=", ("--model.jacobians= has no value",)),
        ("--model.jacobians=relu=1,relu=2", ("relu is given twice",)),
        ("--model.jacobians.relu=nan", ("nan", "number")),
        ("--model.jacobians.relu6=1", ("--model.jacobians.relu6=1", "two numbers, such as [0, 0]")),
        ("--model.jacobians.relu6=[1,2,3]", ("--model.jacobians.relu6", "two numbers")),
        ("--model.jacobians.max_pool=minimall", ("minimall", "native, first, last", "did you mean 'minimal'")),
        ("--model.jacobians.rule=publish", ("exact, published", "did you mean 'published'")),
        ("--model.jacobians=null", ("--model.jacobians=null is not a mapping of options", "relu=1 or jax")),
        ("--model.jacobians=jaxx", ("preset 'jaxx'", "did you mean 'jax'")),
        ("--model.jacobians=rleu=1", ("'rleu'", "did you mean 'relu'")),
        ("--config null.yaml", ("--model.jacobians=null names no choice",)),
        ("--config rule.yaml", ("key of a rule 'operatoin'", "did you mean 'operation'")),
        ("--config choice.yaml", ("'odd'", "max_pool 'minmal'", "did you mean 'minimal'")),
        ("--config field.yaml", ("'odd'", "'rleu'", "did you mean 'relu'", "Fields: relu")),
    ),
    "Networks": [
        *after_config(
            ("--model.backbone=paper/lenet", ("'paper/lenet'", "did you mean paper/lenet5")),
            ("--model.backbone=", ("there is no backbone ''", "paper/<name>")),
            ("--model.backbone=resnet18", ("timm/resnet18", "torchvision/resnet18")),
            ("'--model.backbone_options={batchnorm: 1}'", ("did you mean 'batch_norm'", "It takes")),
            ("--model.backbone=paper/vgg11", ("(1, 28, 28)", "32x32")),
            ("--model.backbone=torchvision/alexnet", ("torchvision/alexnet", "(1, 28, 28)")),
            ("--model.backbone=nets:mkae", ("did you mean 'nets:make'",)),
            ("--model.backbone=nets:number", ("neither a factory nor an nn.Module",)),
            ("--model.pretrained=true", ("no pretrained weights",)),
            ("--model.label_smoothing=2", ("label_smoothing", "0 and 1")),
            ("--model.compile=true --model.jacobians.max_pool=random", ("random", "compile=False")),
            ("--model.compile=true", ("--model.compile=false",)),
            ("--model.optimizer=SDG", ("'SDG'", "torch.optim", "did you mean 'SGD'")),
            ("--model.optimizer=torch.optim.SGDD", ("torch.optim.SGDD", "did you mean 'SGD'")),
            ("--model.optimizer=INNApro", ("did you mean 'INNAprop'",)),
            (
                "--model.optimizer.lrr=1",
                ("--model.optimizer.lrr", "takes lr, momentum", "did you mean '--model.optimizer.lr'"),
            ),
            ("--model.optimizer.lr=-1", ("SGD (--model.optimizer)", "-1")),
            (
                "--model.optimizer=Adam --model.optimizer.betas=0.9",
                ("--model.optimizer.betas=0.9", "expected a list, such as [0.9, 0.999]"),
            ),
            (
                "--model.optimizer=Adam --model.optimizer.betas=[0.9]",
                ("--model.optimizer.betas=[0.9]", "expected a list of 2 values, such as [0.9, 0.999]"),
            ),
            ("--model.optimizer.lr=fast", ("--model.optimizer.lr=fast is not allowed; expected a number",)),
            ("--model.lr_scheduler=CosineAnealingLR", ("did you mean 'CosineAnnealingLR'",)),
            ("--model.lr_scheduler=StepLR", ("StepLR needs step_size", "--model.lr_scheduler.step_size=")),
        ),
        Mistake(
            "fit --config configs/quickstart.yaml --model.backbone=nets:make",
            ("nets:make() failed with NameError", "(nets.py, line 2)"),
            1,
        ),
    ],
    "Data": [
        *after_config(
            ("--data=MNSIT", ("'MNSIT'", "nslightning.data", "did you mean 'MNIST'")),
            ("--task=text", ("--data=FashionMNISTSample is of another kind",)),
            ("--data.batch_sise=3", ("--data.batch_sise", "did you mean '--data.batch_size'")),
            ("--data.batch_size=0", ("batch_size is 0", "at least 1")),
            ("--data.batch_size=1e3", ("--data.batch_size=1000.0", "a whole number")),
            ("--data.workers=-1", ("workers is -1", "at least 0")),
            ("--data.batch_size=abc", ("--data.batch_size=abc", "a whole number")),
        ),
        Mistake("fit --model.backbone=paper/lenet5 --data=ImageFolder", ("--data.root",)),
        Mistake("fit --model.backbone=paper/lenet5 --data=MNIST", ("missing", "--data.download=true"), 1),
        Mistake("fit --model.backbone=paper/vgg11 --data=ImageFolder --data.root=nowhere", ("nowhere", "missing"), 1),
        Mistake(
            "fit --model.backbone=paper/vgg11 --data=ImageFolder --data.root=photos",
            ("one class, cat", "at least two"),
            1,
        ),
    ],
    "Trainer": after_config(
        ("--trainer=3", ("--trainer=3 is not a mapping of options", "--trainer.OPTION=VALUE")),
        ("--trainer.max_epoch=3", ("did you mean '--trainer.max_epochs'",)),
        ("--trainer.max_epochs=many", ("--trainer.max_epochs=many", "a whole number")),
        ("--trainer.max_epochs=0", ("--trainer.max_epochs=0", "from 1 on")),
        ("--trainer.precision=16-mixd", ("bf16-mixed", "did you mean '16-mixed'")),
        ("--trainer.accelerator=gup", ("gup", "auto, cpu, cuda", "did you mean 'gpu'")),
        ("--trainer.devices=3.5", ("devices",)),
        ("--trainer.devices=two", ("--trainer.devices=two", "a number from 1 on")),
        ("--trainer.devices=0", ("--trainer.devices=0", "a number from 1 on", "auto for all")),
        ("--trainer.accelerator=cpu --trainer.devices=100000", ("would start 100000 processes on", "1 is the fastest")),
        ("--trainer.num_sanity_val_steps=-3", ("--trainer.num_sanity_val_steps=-3", "-1 for all")),
        ("--trainer.strategy=dddp", ("dddp", "ddp")),
        ("--trainer.gradient_clip_val=-1", ("--trainer.gradient_clip_val=-1", "from 0 on")),
        ("--trainer.accumulate_grad_batches=0", ("--trainer.accumulate_grad_batches=0", "at least 1")),
        ("--trainer.limit_train_batches=0", ("--trainer.limit_train_batches=0", "nothing would happen")),
        ("--trainer.default_root_dir=x", ("--trainer.default_root_dir=x is not used", "--output")),
        ("--trainer.callbacks+=TieMonitr", ("did you mean 'TieMonitor'",)),
        (
            "--trainer.callbacks+=TieMonitor --trainer.callbacks.every_n_step=3",
            ("did you mean '--trainer.callbacks.every_n_steps'",),
        ),
        (
            "--trainer.callbacks+=TieMonitor --trainer.callbacks.every_n_steps=0",
            ("TieMonitor (--trainer.callbacks.every_n_steps)", "given 0"),
        ),
        (
            "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.save_top_k=-3",
            ("ModelCheckpoint (--trainer.callbacks.save_top_k)", "Must be >= -1"),
        ),
        (
            "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=loss --trainer.callbacks.mode=most",
            ("EarlyStopping (--trainer.callbacks.mode)", "got most"),
        ),
        ("--trainer.logger=WandbLoger", ("did you mean 'WandbLogger'",)),
        (
            "--trainer.callbacks+=WeightDivergence --trainer.callbacks+=WeightDivergence",
            ("two of the callbacks are WeightDivergence with the same settings",),
        ),
    ),
    "Checkpoints": [
        *after_config(
            ("--ckpt_path=nope.ckpt", ("there is no file nope.ckpt",)),
            ("--ckpt_path='a folder'", ("--ckpt_path=a folder is a folder, and a checkpoint is a file",)),
            ("--ckpt_path=bad.ckpt", ("bad.ckpt is damaged",)),
            ("--ckpt_path=", ("--ckpt_path= names no checkpoint", "--ckpt_path=last")),
            ("--ckpt_path=best", ("--ckpt_path=last",)),
        ),
        Mistake("test --config configs/quickstart.yaml --ckpt_path=last", ("no checkpoint in runs/quickstart",)),
    ],
    "Measuring and drawing": [
        Mistake("audit nothere.ckpt", ("there is no file nothere.ckpt", "runs/NAME/NUMBER/checkpoints")),
        Mistake("audit", ("the following arguments are required: MODEL",)),
        Mistake("audit paper/lenet5 --dtypse 32", ("no option --dtypse", "did you mean '--precisions'")),
        Mistake("audit paper/lenet5 --precisions fp16", ("invalid choice: 'fp16'", "'16', 'bf16'")),
        Mistake("audit paper/lenet5 --batch-size 0", ("'0' is not a whole number of at least 1",)),
        Mistake(f"audit paper/lenet5 --seed {10**22}", ("a whole number of at least 0 and at most 4294967295",)),
        Mistake("audit paper/lenet5 --data ''", ("--data has no value",)),
        Mistake("audit paper/lenet", ("no model 'paper/lenet'", "did you mean 'paper/lenet5'")),
        Mistake("audit paper/lenet5 --data MNSIT", ("no such folder or data set", "did you mean 'MNIST'")),
        Mistake("audit paper/lenet5 --data 'a foldr'", ("no such folder or data set", "did you mean 'a folder'")),
        Mistake("audit paper/lenet5 --data CIFAR10", ("missing", "--download", "NSLIGHTNING_DATA_DIR"), 1),
        Mistake("audit paper/lenet5 --device gpu", ("--device=gpu is not here; a GPU is named cuda", "There is cpu")),
        Mistake("audit paper/lenet5 --html nowhere/page.html", ("there is no folder nowhere; make it first",)),
        Mistake("audit resnet18", ("no model 'resnet18'", "'paper/resnet18' or 'timm/resnet18' or ")),
        Mistake("audit 'a folder'", ("a folder is a folder: name a checkpoint",)),
        Mistake("audit plain.txt", ("plain.txt cannot be read as a checkpoint", "torch.save did not write it"), 1),
        Mistake("audit paper/lenet5 --weights bad.ckpt", ("bad.ckpt cannot be read", "torch.save did not write it"), 1),
        Mistake("audit nets.py", ("nets.py is code", "as nets:FUNCTION")),
        Mistake("audit net:make", ("no module 'net'", "did you mean 'nets:make'")),
        Mistake("audit nets:make", ("nets:make() failed with NameError", "(nets.py, line 2)"), 1),
        Mistake("zones --bactch-size 3", ("no option --bactch-size", "did you mean '--batch-size'")),
        Mistake("zones --data MNIST --backbone paper/lenet5", ("missing", "--download"), 1),
        Mistake("zones --choices relu0:relu=0", ("the same choice",)),
        Mistake("cost paper/lenet5", ("paper/lenet5 stands alone", "did you mean '--backbone=paper/lenet5'")),
        Mistake("cost --backbone paper/lenet5 --choices relu1", ("write NAME:FIELD=VALUE",)),
        Mistake("cost --backbone paper/lenet5 --choises relu1:relu=1", ("did you mean '--choices'",)),
        Mistake("experiment mnist_lenet_bta", ("did you mean 'mnist_lenet_beta'",)),
        Mistake("experiment grid.yaml --scale smoke", ("'epoch'", "did you mean 'epochs'")),
        Mistake("experiment scales.yaml --scale smoke", ("scales.smoke has the key 'epochs'", "under fixed")),
        Mistake("experiment scale.yaml --scale smoke", ("scales has the key 'smoek'", "smoke, small, paper")),
        Mistake("experiment fixed.yaml --scale smoke", ("fixed is a mapping of settings; given 3",)),
        Mistake("experiment mnist_lenet_beta --scale smal", ("no scale 'smal'", "did you mean 'small'")),
        Mistake("figure fig33 --from nowhere", ("did you mean 'fig3'",)),
        Mistake("figure fig3", ("give --from",)),
        Mistake("report nowhere", ("nowhere does not exist",)),
        Mistake("report 'a folder'", ("holds no run",)),
        Mistake("report runs --oot page.html", ("no option --oot", "did you mean '--out'")),
        Mistake("dashboard", ("--entity",)),
        Mistake("dashboard --entity '' --project x", ("--entity has no value",)),
        Mistake("dashboard --entty me", ("no option --entty", "did you mean '--entity'")),
        Mistake("tokens --txt a.txt --out tokens", ("no option --txt", "did you mean '--text'")),
        Mistake("tokens --text nowhere.txt --out tokens", ("nowhere.txt",), 1),
        Mistake("shards images", ("name the folder to be made", "--verify")),
        Mistake("shards nowhere shards", ("nowhere/train: missing",), 1),
        Mistake("lr-search --config configs/quickstart.yaml --trails 3", ("did you mean '--trials'",)),
        Mistake("lr-search --config configs/quickstart.yaml --high=1e-9", ("0 < low < high",)),
        Mistake(
            "sweep --config configs/quickstart.yaml --search data.batch_size=8|16 --storage study",
            ("--storage=study is no URL", "sqlite:///"),
        ),
        Mistake("lr-search --config configs/quickstart.yaml --metric val/loss", ("val/loss is a loss", "--minimise")),
        Mistake("lr-search", ("--data is needed",)),
        Mistake("lr-search --config configs/quickstart.yaml --low a", ("--low", "'a'")),
        Mistake("lr-search --config configs/quickstart.yaml --output=", ("--output has no value",)),
        Mistake("twins", ("--model.choices and --data are needed",)),
        Mistake("twins --config configs/quickstart.yaml", ("--model.jacobians.relu", "--model.choices.NAME.relu")),
        Mistake("twins --config configs/twins_mnist_lenet.yaml --task=text", ("twins takes --task=images",)),
    ],
}

#: Parts of an answer that depend on the machine.
_ELSEWHERE = (
    (r"PyTorch \d[\w.+]*", "PyTorch 2.x"),
    (r"on \d+ processor cores", "on 8 processor cores"),
    (r"at most \d+ are allowed", "at most 32 are allowed"),
)


def prepare() -> None:
    """Write the files into the current folder."""
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def answer(typed: str) -> tuple[int, str]:
    """Type a command in this process.

    Args:
        typed: The command line after ``nslightning``, as a shell reads it.

    Returns:
        The exit status, and the error from its first word on, with nothing of the machine in it.
    """
    from nslightning import configs
    from nslightning.cli import main

    sys.modules.pop("nets", None)  # of another folder
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(shlex.split(typed))
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    text = err.getvalue()
    start = re.search(r"^nslightning(?: [\w-]+)?: (?!loading|--\S+ is spelled)", text, re.MULTILINE)
    error = text[start.start() :].strip() if start else text
    for folder, instead in ((Path.cwd(), ""), (Path(configs.__file__).parent, "configs/")):
        error = error.replace(f"{folder}{os.sep}", instead).replace(str(folder), instead.rstrip("/") or ".")
    for pattern, instead in _ELSEWHERE:
        error = re.sub(pattern, instead, error)
    return int(status), error


def row(mistake: Mistake, status: int, error: str) -> str:
    """A row of the page.

    Args:
        mistake: The mistaken call.
        status: The exit status.
        error: The answer.

    Returns:
        A line of Markdown.
    """
    lines = "<br>".join(f"`{_escaped(line.strip())}`" for line in error.splitlines())
    return f"| `nslightning {_escaped(mistake.typed)}` | {lines} | {status} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
