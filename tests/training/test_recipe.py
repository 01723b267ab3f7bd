"""Recipes: what is refused, how it is said, and that all shipped ones are sound."""

import json

import pytest

from memseg.data import Fit
from memseg.errors import InputError, RecipeError, UnknownNameError
from memseg.resources import shipped_folder
from memseg.training.recipe import load_recipe, override_recipe, parse_recipe
from memseg.training.trainer import training_length

SHIPPED = sorted(shipped_folder("recipes").rglob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_by_path_and_by_name(path):
    recipe = load_recipe(path)
    assert recipe == load_recipe(path.stem)
    assert recipe.name == path.stem
    assert recipe.description
    assert parse_recipe(json.loads(recipe.to_json()), "recipe.json") == recipe


def test_the_papers_recipes_are_shipped():
    full, half = load_recipe("ldn169_cityscapes"), load_recipe("table1_ladder_densenet121")
    assert (full.data.image, full.train.batch, full.schedule.epochs) == ((1024, 2048), 2, 30)
    assert (half.data.image, half.data.region, half.train.batch) == ((448, 1024), (30, 900, 0, 2048), 4)
    assert half.data.fit is Fit.RESIZE
    for recipe in (full, half):
        assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (5e-4, 1e-4)
        assert (recipe.optimizer.pretrained_lr_factor, recipe.schedule.poly_power) == (0.2, 1.5)
        assert recipe.loss.aux_weight == 0.3


PUBLISHED = {
    # Kreso et al. 2017: mIoU and pixel accuracy in per cent, by table and row.
    "table1_resnet50_32x": (60.95, 91.98),
    "table1_ladder_resnet50": (69.53, 94.42),
    "table1_dilated_resnet50": (69.23, 94.47),
    "table1_densenet121_32x": (62.52, 92.29),
    "table1_dilated_densenet121": (71.56, 94.92),
    "table1_ladder_densenet121_single": (71.73, 94.99),
    "table1_ladder_densenet121": (72.82, 95.06),
    "table1_ladder_densenet169_split34": (72.69, 95.08),
    "table1_ladder_densenet169_spp": (72.34, 95.04),
    "table1_ladder_densenet169": (73.72, 95.11),
    "table3_ladder_resnet50": (55.49, 92.29),
    "table3_ladder_densenet121": (62.32, 93.63),
    "table4_ladder_densenet169_frozen": (75.24, 96.02),
    "table4_ladder_densenet169_finetune": (75.75, 95.88),
    "table5_ladder_densenet169": (74.6, None),
    "table6_ladder_resnet50": (62.97, 91.56),
    "table6_ladder_densenet169": (70.21, 93.29),
    "table6_ladder_densenet169_aug": (78.01, 95.11),
}


def test_there_is_a_recipe_for_every_row_of_the_paper_s_tables_with_its_figures():
    recipes = {path.stem: load_recipe(path) for path in SHIPPED if path.stem.startswith("table")}
    found = {name: (recipe.reference.miou, recipe.reference.pixel_accuracy) for name, recipe in recipes.items()}
    assert found == PUBLISHED
    assert recipes["table5_ladder_densenet169"].reference.iiou == 51.54


def test_rows_of_a_table_differ_in_what_they_are_about_alone():
    half = load_recipe("table1_ladder_densenet121")
    for name in PUBLISHED:
        recipe = load_recipe(name)
        assert (recipe.schedule.poly_power, recipe.optimizer.weight_decay) == (1.5, 1e-4)
        if name.startswith(("table1", "table3")):
            assert (recipe.data, recipe.train, recipe.schedule, recipe.optimizer, recipe.loss) == (
                (half.data, half.train, half.schedule, half.optimizer, half.loss)
            )
            assert (recipe.model.encoder_weights is None) == name.startswith("table3")
    frozen, batch = (load_recipe(f"table4_ladder_densenet169_{kind}") for kind in ("frozen", "finetune"))
    assert (frozen.model.norm, batch.model.norm) == ("frozen", "batch")
    assert frozen.data.image == batch.data.image == (1024, 2048)
    assert frozen.model.model_copy(update={"norm": batch.model.norm}) == batch.model


def write(folder, name, text):
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_recipe_holds_only_its_difference(tmp_path):
    write(
        tmp_path,
        "base",
        'extends = "streets_demo"\nname = "base"\n[train]\nbatch = 4\n[reference]\nsource = "us"\nmiou = 50',
    )
    child = write(tmp_path, "child", 'extends = "base.toml"\nname = "child"\n[train]\nseed = 3\n[schedule]\nepochs = 2')
    recipe, streets = load_recipe(child), load_recipe("streets_demo")
    assert (recipe.train.batch, recipe.train.seed, recipe.train.log_every) == (4, 3, streets.train.log_every)
    assert (recipe.schedule.epochs, recipe.schedule.steps) == (2, None)
    assert (recipe.name, recipe.description, recipe.reference) == ("child", "", None)
    assert (recipe.data, recipe.optimizer) == (streets.data, streets.optimizer)


def test_what_extends_wrongly_is_told_in_one_error(tmp_path):
    write(tmp_path, "one", 'extends = "two.toml"')
    circle = write(tmp_path, "two", 'extends = "one.toml"')
    with pytest.raises(RecipeError, match=r"must not extend itself, found two\.toml -> one\.toml -> two\.toml"):
        load_recipe(circle)
    with pytest.raises(RecipeError, match=r"gone\.toml: 1 problem\n.*No such file.*extended by .*lost\.toml"):
        load_recipe(write(tmp_path, "lost", 'extends = "gone.toml"'))
    with pytest.raises(RecipeError, match="extends: unknown recipe 'streets-demo'; did you mean streets_demo"):
        load_recipe(write(tmp_path, "misspelt", 'extends = "streets-demo"'))
    with pytest.raises(RecipeError, match="extends: must be the name or the path of a recipe in quotes, got 3"):
        load_recipe(write(tmp_path, "number", "extends = 3"))
    with pytest.raises(RecipeError, match=r"both\.toml: 1 problem\n  schedule.steps: exactly one of"):
        load_recipe(write(tmp_path, "both", 'extends = "streets_demo"\nname = "b"\n[schedule]\nepochs = 1\nsteps = 2'))


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        """
name = "mine"
[data]
dataset = "citiscapes"
image = "1024"
fit = "padd"
region = [900, 30, 0, 2048]
[data.streets]
lenght = 3
[model]
name = "ladder-densenet12"
[schedule]
epochs = 30
steps = 100
[optimizer]
lr = -1
betas = [0.9, 1.0]
[train]
batchsize = 4
workers = "two"
seed = 1.5
"""
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 12 problems",
        "  data.dataset: unknown data set 'citiscapes'; did you mean cityscapes?",
        "  data.image: an image size must be HEIGHTxWIDTH in pixels, got '1024'; try 1024x2048",
        "  data.fit: must be pad, crop or resize, got 'padd'; did you mean pad?",
        "  data.region: must be [top, bottom, left, right] in pixels with top < bottom and left < right, "
        "got [900, 30, 0, 2048]; try [30, 900, 0, 2048]",
        "  data.streets.lenght: unknown key; did you mean length?",
        "  model.name: unknown model 'ladder-densenet12'; did you mean ladder-densenet121?",
        "  optimizer.lr: must be greater than 0, got -1",
        "  optimizer.betas[1]: must be less than 1, got 1.0",
        "  schedule.steps: exactly one of schedule.epochs and schedule.steps must be given, "
        "got epochs 30 and steps 100",
        "  train.seed: must be a whole number, got 1.5",
        "  train.workers: must be a whole number, got 'two'",
        "  train.batchsize: unknown key; did you mean batch?",
    ]


def test_what_is_missing_is_told(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[data]\ndataset = "camvid"\nimage = "384x512"\n[schedule]\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [
        "data.root: the data set camvid needs the folder that holds it; give data.root",
        "model: must be given",
        "schedule.steps: exactly one of schedule.epochs and schedule.steps must be given, got neither",
    ]


def test_streets_options_belong_to_streets():
    with pytest.raises(RecipeError, match="options of the data set streets, but dataset is camvid"):
        load_recipe("camvid_mini", ["data.streets.length=3"])
    with pytest.raises(RecipeError, match="streets is generated and has no folder"):
        load_recipe("streets_demo", ["data.root=somewhere"])


def test_overrides_take_toml_values_and_bare_text():
    recipe = load_recipe(
        "camvid_mini",
        [
            "train.batch=1",
            "data.root=else where/camvid",
            "data.flip=false",
            "optimizer.betas=[0.5, 0.9]",
            "run.cards=cpu:8GiB,cpu:12GiB",
            "data.image=192x256",
            'name="quoted"',
        ],
    )
    assert (recipe.train.batch, str(recipe.data.root), recipe.data.flip) == (1, "else where/camvid", False)
    assert (recipe.optimizer.betas, recipe.run.cards) == ((0.5, 0.9), "cpu:8GiB,cpu:12GiB")
    assert (recipe.data.image, recipe.name) == ((192, 256), "quoted")


def test_passes_are_counted_and_every_strategy_can_be_asked_for():
    recipe = load_recipe("camvid_mini", ["train.accumulation=3", "run.strategy=replicate-split"])
    assert (recipe.train.accumulation, recipe.run.strategy) == (3, "replicate-split")
    assert load_recipe("camvid_mini").train.accumulation == 1
    with pytest.raises(RecipeError) as caught:
        load_recipe("camvid_mini", ["train.accumulation=0", "run.strategy=replicated"])
    assert caught.value.problems == [
        "train.accumulation: must be greater than 0, got 0",
        "run.strategy: must be auto, single, split, replicate or replicate-split, got 'replicated'; "
        "did you mean replicate?",
    ]


@pytest.mark.parametrize(("accumulation", "expected"), [(1, (12, 24)), (4, (3, 6)), (5, (2, 4))])
def test_an_epoch_leaves_out_what_is_no_whole_step(accumulation, expected):
    settings = ["train.batch=8", f"train.accumulation={accumulation}", "schedule.epochs=2"]
    assert training_length(load_recipe("camvid_mini", settings), 100) == expected


def test_a_step_of_more_images_than_there_are_is_refused():
    recipe = load_recipe("camvid_mini", ["train.batch=8", "train.accumulation=4"])
    with pytest.raises(InputError, match=r"train\.batch is 8 and train\.accumulation 4, there are 31 images"):
        training_length(recipe, 31)


def test_overriding_steps_replaces_epochs():
    recipe = load_recipe("camvid_mini", ["schedule.steps=7"])
    assert (recipe.schedule.epochs, recipe.schedule.steps) == (None, 7)
    back = override_recipe(recipe, ["schedule.epochs=2"])
    assert (back.schedule.epochs, back.schedule.steps) == (2, None)


def test_bad_overrides_are_told_with_the_other_problems():
    with pytest.raises(RecipeError) as caught:
        load_recipe("streets_demo", ["train.batch", "name.first=x", "trian.batch=2", "train.batch=0"])
    assert caught.value.problems == [
        "train.batch: an override must be written key=value; try train.batch=4",
        "name.first=x: name is a value and holds no keys",
        "train.batch: must be greater than 0, got 0",
        "trian: unknown key; did you mean train?",
    ]


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    torn = tmp_path / "torn.toml"
    torn.write_text('name = "torn\n')
    with pytest.raises(RecipeError, match=r"torn\.toml.*\n.*must be TOML: .*line 1"):
        load_recipe(torn)
    with pytest.raises(RecipeError, match=r"absent\.toml: 1 problem\n.*cannot be read: No such file"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(UnknownNameError, match="did you mean streets_demo"):
        load_recipe("streets-demo")


def test_generated_streets_open_with_the_recipes_options():
    data = load_recipe("streets_demo", ["data.streets.length=5", "data.streets.val_length=3"]).data
    assert (len(data.open_train()), len(data.open_val())) == (5, 3)
    assert data.open_val().size(0) == data.image
