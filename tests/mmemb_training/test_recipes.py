"""Recipes, their errors, and the command that estimates them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mmemb_deploy.errors import OptionError
from mmemb_training.recipes.command import plan
from mmemb_training.recipes.load import load_recipe
from mmemb_training.recipes.settings import Margins, RunRecipe
from mmemb_training.recipes.shapes import SHAPES


def recipe_of(folder: Path, text: str) -> RunRecipe:
    """A user's recipe."""
    path = folder / "mine.toml"
    path.write_text(f'extends = "qwen3-vl-2b-lora"\n{text}')
    return load_recipe(path)


def test_a_recipe_changes_what_it_says_and_takes_the_rest(tmp_path: Path) -> None:
    base = load_recipe("qwen3-vl-2b-lora")
    mine = recipe_of(tmp_path, "[joint]\nbatch = 64\n[joint.schedule]\nsteps = 10")
    assert (mine.name, mine.joint.batch) == ("mine", 64)
    assert (mine.joint.schedule.steps, mine.joint.schedule.epochs) == (10, None)
    assert mine.joint.schedule.learning_rate == base.joint.schedule.learning_rate == 5e-5
    assert mine.control == base.control


def test_public_settings_are_those_that_were_published() -> None:
    recipe = load_recipe("qwen3-vl-4b-full")
    objective, control, lora = recipe.joint.objective, recipe.control, recipe.weights.lora
    assert (objective.temperature, objective.lambda_g, objective.lambda_d) == (0.02, 1.0, 1.0)
    assert (control.group, control.beta, control.schedule.learning_rate) == (8, 0.04, 5e-6)
    assert (lora.rank, lora.alpha) == (32, 32)


def test_every_setting_of_selection_is_reached_by_a_recipe(tmp_path: Path) -> None:
    mine = recipe_of(
        tmp_path, '[selection]\nevaluator = "embedder"\n[selection.margins]\nagainst_negatives = true\ngain = 1.5'
    )
    assert mine.selection.margins == Margins(gain=1.5, content=0.5, against_negatives=True)
    with pytest.raises(OptionError, match=r"selection\.margins\.against_negatives is true and evaluator is 'judge'"):
        recipe_of(tmp_path, "[selection.margins]\nagainst_negatives = true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[joint.objective]\nlambda_x = 3", "did you mean 'lambda_g'"),
        ("[joit]\nbatch = 3", "did you mean 'joint'"),
        ("[weights.lora]\nrnk = 3", "did you mean 'rank'"),
        ('[[pool.workers]]\nname = "a"\nmodl = "b"', "did you mean 'model'"),
        ('[[pool.workers]]\nname = "a"', r"pool\.workers\.0\.model is not set"),
        ('[[pool.workers]]\nname = ""\nmodel = "b"', r"pool\.workers\.0\.name is ''"),
        ("[pool]\nworkers = []", r"pool\.workers is \[\]"),
        ("[joint]\nbatch = 0", r"joint\.batch is 0: .*at least 1"),
        ("[joint]\nbatch = true", r"joint\.batch is True"),
        ("[joint]\nbatch = 2.5", r"joint\.batch is 2\.5"),
        ('[weights]\nmethod = "lra"', r"weights\.method is 'lra': .*'full' or 'lora'"),
        ("[joint.schedule]\nlearning_rate = nan", r"joint\.schedule\.learning_rate is nan"),
        ("[joint.schedule]\nlearning_rate = inf", r"joint\.schedule\.learning_rate is inf"),
        ("[joint.schedule]\nwarmup = -1", r"joint\.schedule\.warmup is -1: .*at least 0"),
        ("[joint.schedule]\nsteps = 5\nepochs = 2.0", r"joint\.schedule\.epochs is 2\.0 and steps is 5"),
        ("[control.schedule]\nepochs = 2.0", r"control\.schedule\.epochs is set"),
        ("[control]\nupdates = 3", r"control\.schedule\.save_every is 100: it must be a multiple of updates"),
        ("[joint.objective]\ndims = [64, 128]", r"joint\.objective\.dims is \[64, 128\]"),
        ("[joint.objective]\ndims = []", r"joint\.objective\.dims is \[\]"),
        ("[weights.lora]\ndropout = 1.0", r"weights\.lora\.dropout is 1\.0: .*below 1"),
        ('[weights.lora]\ntargets = ["q_prj"]', r"weights\.lora\.targets: 'q_prj' .*did you mean 'q_proj'"),
        ("[weights.lora]\ntargets = []", r"weights\.lora\.targets is \[\]"),
        ("[control]\ngroup = 1", r"control\.group is 1: .*at least 2"),
        ("[control.rewards]\nsigma = 0.0", r"control\.rewards\.sigma is 0\.0: .*above 0"),
        ("[selection]\nother_rationales = 0", r"selection\.other_rationales is 0: .*at least 1"),
        ("[model]\nvideo_frames = 1", r"model\.video_frames is 1: .*at least 2"),
        ("[joint", "is not TOML"),
        ('name = "x"', "named by its file"),
    ],
)
def test_a_bad_recipe_names_key_value_and_limit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe_of(tmp_path, text)


def test_workers_of_one_name_are_refused(tmp_path: Path) -> None:
    worker = '[[pool.workers]]\nname = "a"\nmodel = "b"\n'
    with pytest.raises(OptionError, match=r"pool\.workers are named a, a"):
        recipe_of(tmp_path, worker + worker)


def test_unknown_recipes_name_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'qwen3-vl-2b-lora'"):
        load_recipe("qwen3-vl-2b-lor")
    with pytest.raises(OptionError, match="does not exist"):
        load_recipe("nowhere.toml")


def run_plan(*arguments: str) -> str:
    """What `mmemb train plan` prints."""
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.output


def test_the_command_prints_the_plan_as_json() -> None:
    arguments = ("--model", "qwen3-vl-2b", "--gpus", "8", "--memory-gib", "80", "--method", "full", "--json")
    made = json.loads(run_plan(*arguments, "--device", "h100", "--batch", "512"))
    assert made["fits"] is True
    assert made["recipe"] == "qwen3-vl-2b-full"
    optimizer = made["figures"]["memory of a GPU, stage 3 (joint)"]["optimizer"]
    assert optimizer["value"] == 8 * SHAPES["qwen3-vl-2b"].parameters() / 8


def test_the_command_draws_a_table_and_says_what_does_not_fit() -> None:
    assert "fits: " in run_plan("--model", "Qwen/Qwen3-VL-2B-Instruct", "--gpus", "8", "--device", "h100")
    shown = run_plan("--model", "qwen3-vl-4b", "--method", "full", "--device", "rtx-4090")
    assert "does not fit: " in shown
    assert "fits with method = lora" in shown


def test_a_model_without_a_recipe_asks_for_one() -> None:
    with pytest.raises(OptionError, match="no recipe is named 'qwen3-vl-8b-lora'"):
        run_plan("--model", "qwen3-vl-8b", "--device", "h100")
    with pytest.raises(OptionError, match="method 'lra' is not known"):
        run_plan("--method", "lra", "--device", "h100")
    made = json.loads(
        run_plan("--model", "qwen3-vl-8b", "--recipe", "qwen3-vl-4b-lora", "--memory-gib", "80", "--json")
    )
    assert made["model"] == "qwen3-vl-8b"


def test_a_plan_needs_no_torch() -> None:
    source = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "accelerate", "peft"))
from mmemb_deploy.cli.main import main
sys.argv = ["mmemb", "train", "plan", "--device", "h100", "--json"]
main()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "qwen3-vl-4b-lora"
