"""The picture of a run: it is drawn from what the run logged, whatever is missing of it."""

import numpy as np
import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.reports.training_curves import save_training_curves

ORANGE = (217, 95, 2)
BLUE = (31, 120, 180)


def colour_pixels(path, colour) -> int:
    """Pixels of that colour in the plots themselves, left of and above the legends' corners."""
    with Image.open(path) as image:
        assert image.size == (1400, 900)
        plots = np.asarray(image.convert("RGB"))[:800, :1150]
    return int((plots == colour).all(-1).sum())


@pytest.mark.parametrize("scored", [False, True])
def test_loss_and_scores_are_drawn_where_they_were_logged(tmp_path, scored):
    records = [{"step": step, "loss": 2 / step} for step in range(1, 41)]
    records += [{"step": 20, "miou": 0.5, "pixel_accuracy": 0.9}] if scored else []
    save_training_curves(records, tmp_path / "curves.png", title="a run")
    assert colour_pixels(tmp_path / "curves.png", ORANGE) > 0
    assert (colour_pixels(tmp_path / "curves.png", BLUE) > 0) == scored


def test_a_loss_that_was_not_finite_leaves_a_gap_not_an_error(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    save_training_curves(records, tmp_path / "curves.png", title="a run")
    assert colour_pixels(tmp_path / "curves.png", ORANGE) > 0


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["curves", str(tmp_path)]) == 2
    assert "must be a run folder" in capsys.readouterr().err
