"""Finds the checkpoint that a run goes on from, and refuses it if the run that wrote it was another one."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

from pydantic import ValidationError

from silva.engine import file_errors
from silva.engine.checkpoint import index
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.errors import UserError
from silva.engine.model import hf
from silva.engine.objectives import OBJECTIVES
from silva.engine.progress import say
from silva.engine.recipe import identity
from silva.engine.recipe.schema import Recipe
from silva.engine.training.inputs import Inputs
from silva.engine.training.reference_policy import weights_digest

# bytes of each of the places of a weight file that go into its digest
_SAMPLE, _SAMPLES = 1 << 16, 16


def run_of(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """Return what makes this run what it is; it is kept with every checkpoint.

    The call is collective.

    Args:
        recipe: of the run.
        inputs: of the run.

    Returns:
        As `identity.of`.
    """

    def compute() -> dict[str, Any]:
        contents = {
            "data": inputs.data.fingerprint,
            "tokenizer": inputs.tokenizer.fingerprint,
            "model": weights_sample(inputs.folder),
            "steps": inputs.steps,
        }
        if recipe.data.validation and inputs.validation is not None:
            contents["validation"] = inputs.validation.fingerprint
        if OBJECTIVES[recipe.objective.name].needs_reference:
            # every byte counts here, because the log-probs may have to be computed again
            contents["reference"] = weights_digest(hf.fetch(recipe.reference_path))
        return identity.of(recipe, contents)

    found: dict[str, Any] = groups.from_first(compute)
    return found


def newest(recipe: Recipe, run: dict[str, Any]) -> Path | None:
    """Return the newest checkpoint of this run; None if it has none yet.

    The call is collective.

    Args:
        recipe: of the run.
        run: of `run_of`.

    Raises:
        UserError: the checkpoint was written by a run with other settings or inputs, or every checkpoint is damaged.
    """
    asides: list[str] = []

    def find() -> tuple[Path | None, str | None]:
        saved = index.checkpoints(Path(recipe.output) / "checkpoints")
        if not saved and asides:
            raise UserError(
                f"{recipe.output}: every checkpoint is damaged ({', '.join(asides)}); to start from the beginning, "
                "remove these folders"
            )
        if not saved:
            return None, None
        try:
            _check(recipe, _described(saved[-1]), run)
        except index.Damaged as error:
            return saved[-1], str(error)
        return saved[-1], None

    while True:
        found, problem = groups.from_first(find)
        if found is not None and problem is None and recipe.resume.verify:
            problem = index.damage(found)
        if problem is None:
            newest_one: Path | None = found
            return newest_one
        assert found is not None
        aside = groups.from_first(partial(index.set_aside, found))
        asides.append(str(aside))
        say(f"damaged    {problem}")
        say(f"           the checkpoint is now called {aside.name}; the run goes on from the one before it")


def to_export(recipe: Recipe, folder: Path, tokenizer: ChatTokenizer) -> Path:
    """Return the newest checkpoint of a recipe's run, if its model is the one that the recipe describes.

    The call is collective.

    Args:
        recipe: of the run.
        folder: of the checkpoint that training started from.
        tokenizer: of the recipe.

    Raises:
        UserError: there is no checkpoint, or it was written by a run with another model, objective or tokenizer.
    """

    def find() -> Path:
        saved = index.checkpoints(Path(recipe.output) / "checkpoints")
        if not saved:
            raise UserError(
                f"{recipe.output}: no checkpoint to export; check that the run has saved one and that `output` is "
                "its folder"
            )
        now = identity.of(recipe, {"model": weights_sample(folder), "tokenizer": tokenizer.fingerprint})
        only = [name for name in identity.names() if name.startswith(("objective.", "model.", "tokenizer."))]
        changed = identity.differences(_described(saved[-1]), now, only=only)
        if changed:
            raise UserError(
                f"{saved[-1]}: was written with another recipe: {_listed(changed)}; set this back"
            )
        return saved[-1]

    found: Path = groups.from_first(find)
    problem = index.damage(found) if recipe.resume.verify else None
    if problem is not None:
        raise UserError(f"{problem}; remove the checkpoint to export the one before it")
    return found


def keep_recipe(recipe: Recipe, step: int) -> None:
    """Write `recipe.yaml`; one that said something else until this step is kept under another name.

    Args:
        recipe: of the run.
        step: that comes next.
    """
    output = Path(recipe.output)
    file, earlier = output / "recipe.yaml", output / f"recipe-until-step-{step:08d}.yaml"
    text = recipe.dump()
    with file_errors.named(file):
        output.mkdir(parents=True, exist_ok=True)
        # of several starts at one step, only the first ends a part of the run
        if step and file.is_file() and file.read_text(encoding="utf-8") != text and not earlier.exists():
            file.rename(earlier)
        file.write_text(text, encoding="utf-8")


def weights_sample(folder: Path) -> str:
    """Compute a digest of a checkpoint's config and of samples of its weights, which tells fine-tuned models apart.

    Every file gives its size, its first bytes and others at equal distances, so the digest of a model of any size is
    there at once.
    """
    whole = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        whole.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                whole.update(file.read(_SAMPLE))
    return whole.hexdigest()


def _described(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run; keys that its recipe did not know yet have their defaults."""
    saved = index.described(checkpoint)
    try:
        recipe = Recipe.model_validate(saved["recipe"])
        return saved | identity.of(recipe, saved["contents"])
    except (ValidationError, KeyError, TypeError):
        raise UserError(
            f"{checkpoint / index.RUN}: was written by another version of Silva, which describes a run "
            "otherwise; go on with that version, or give the new run another `output`"
        ) from None


def _listed(changed: dict[str, str]) -> str:
    return "; ".join(f"{name} {what}" for name, what in changed.items())


def _check(recipe: Recipe, saved: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise UserError unless a checkpoint was written by this run, or one that may go on as this one."""
    step, steps, now = saved["step"], saved["contents"]["steps"], run["contents"]["steps"]
    where = f"{recipe.output}: holds a run that is " + (
        f"finished, with {steps} steps" if step == steps else f"at step {step} of {steps}"
    )
    # a run with nothing left to train is not what the changed recipe says
    finished = step == steps == now
    changed = identity.differences(saved, run, allowed=() if finished else recipe.resume.change)
    if changed:
        advice = "Set this back, or give the new run another `output`"
        if not finished and set(changed) <= set(identity.CHANGEABLE):
            advice += f"; to go on with the change on purpose, add resume.change=[{','.join(changed)}]"
        raise UserError(
            f"{where}, and this recipe differs from it: {_listed(changed)}. Nothing was trained. {advice}"
        )
    if now == steps:
        return
    schedule = recipe.training.schedule
    rising = math.ceil(recipe.training.warmup * now)
    if now < step:
        problem = f"training.epochs and training.max_steps ask for {now} steps"
    elif schedule != "constant":
        problem = (
            f"the learning rates of the steps taken belong to training.schedule {schedule} over {steps} steps"
        )
    elif step < rising:
        problem = f"the warm-up over {now} steps takes {rising} steps (training.warmup), and was another one"
    else:
        return
    raise UserError(
        f"{where}, and cannot become one with {now} steps: {problem}. Nothing was trained. Set training.epochs and "
        "training.max_steps back, or give the new run another `output`"
    )
