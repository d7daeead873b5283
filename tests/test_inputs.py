"""Which files the command line takes, by the channels of the model."""

import numpy as np
import pytest
from PIL import Image
from tifffile import imwrite

from densectx.errors import ConfigError
from densectx.inference.inputs import channels_read, collect


def test_models_of_n_channels_take_tiff_and_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 4, 4), np.float32))
    imwrite(tmp_path / "b.tif", np.zeros((5, 4, 4), np.float32), photometric="minisblack")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")

    def found(channels, argument=str(tmp_path)):
        images = collect([argument], tmp_path / "out", ["t"], overwrite=False, channels=channels).images
        return [image.path.name for image in images]

    assert found(5) == found(5, f"{tmp_path}/*") == ["a.npy", "b.tif"]
    assert found(3) == found(3, f"{tmp_path}/*") == ["b.tif", "c.png"]
    assert found(3, str(tmp_path / "a.npy")) == ["a.npy"]  # named itself: the reader says what is wrong


def test_channels_that_files_are_read_with():
    assert channels_read([3]) == channels_read([1, 3]) == channels_read([1]) == 3
    assert channels_read([5, 5]) == 5
    with pytest.raises(ConfigError, match=r"images of \[3, 5\] channels"):
        channels_read([1, 5])
