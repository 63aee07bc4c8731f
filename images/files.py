"""Files: from what is in an image file to the channels that a network takes.

    photograph --Pillow--> upright --> RGB, uint8 ------------------+
                                                                    +--> (channels, H, W)
    array, or more than 8 bits a pixel --> floats from 0 to 1 ------+

Idea     Images of three channels are taken for photographs and kept as bytes (uint8) until they
         are on the device: a quarter of the memory of floats. Images of any other number of
         channels may come from a microscope or a satellite, with 16 bits a pixel. Bytes would
         cut them to 8, so they are floats from 0 to 1.
Paper    none
Try      python -m images.data folder:PATH
Change   another kind of file: EXTENSIONS, and a branch of read_file
Tests    pytest tests/images/test_files.py

Letters  C channels as they are in the file, H W pixels.
"""

import errno
import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from augment import luma

ARRAYS = (".npy",)  # (H, W), (C, H, W) or (H, W, C); integers, or floats from 0 to 1
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def read_file(file: Path | io.BytesIO, channels: int = 3) -> Tensor:
    """Any image file, or a .npy -> (channels, H, W) as in_channels gives it.

    It is turned upright as its EXIF says. ValueError for what is no image of these channels;
    for a file that does not decode, what the decoder raises (mostly an OSError).
    """
    with open(file, "rb") if isinstance(file, Path) else file as stream:
        # What a file is follows from its first bytes, because its name may be wrong or unknown.
        if stream.read(6) == b"\x93NUMPY":
            stream.seek(0)
            # A pickle in an array could run code, so it is refused. A file whose end is missing
            # is a broken one, as for a picture; numpy says ValueError to it.
            try:
                array = np.load(stream, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise OSError(f"not a readable array ({error})") from None
            return from_array(array, channels)

        # Pillow's own message would show the Python object that it was given. The bytes from a
        # tar file have no name here: the caller knows it.
        try:
            image = Image.open(stream)
        except UnidentifiedImageError:
            name = file if isinstance(file, Path) else "this"
            raise OSError(f"{name} is no image that Pillow can read") from None
        except Image.DecompressionBombError as error:  # some hundred megapixels: for every
            raise OSError(str(error)) from None  # caller a file like one that does not decode

        with image:
            # A camera that was held sideways writes the image as its sensor saw it, and beside
            # it how to turn it.
            image = ImageOps.exif_transpose(image)

            # The modes "I;16" and "I" hold 16 bits, the second one in integers of 32 bits. So
            # they are divided by 65,535 and not by the largest number of their type; numbers
            # that are larger still are refused by from_array.
            if image.mode.startswith("I"):
                return from_array(np.asarray(image) / np.float32(65535), channels)

            # Mode "F" is floats. Four bands for a network of four channels are taken as they
            # are; Pillow would take the fourth for transparency.
            bands = len(image.getbands())
            if image.mode == "F" or (channels not in (1, 3) and bands == channels):
                return from_array(np.array(image), channels)

            # Everything else is a picture: grey, palette, CMYK and transparency become RGB.
            return in_channels(pil_to_tensor(image.convert("RGB")), channels)


# Numbers of errors that may pass: a network disk that is out of reach, a machine that is short of
# something. A file that is not there, or that may not be read, will not be there tomorrow.
# NFS, Lustre, CIFS and FUSE each have their own numbers; not every system knows all of them.
PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "ENOTCONN", "ECONNRESET",
                 "ECONNREFUSED", "ECONNABORTED", "ESHUTDOWN", "EHOSTDOWN", "EHOSTUNREACH",
                 "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ENOLINK", "ECOMM", "EPIPE", "EMFILE",
                 "ENFILE", "ENOMEM") if hasattr(errno, name)}


def may_pass(error: Exception) -> bool:
    """Whether it is an error of the disk or the machine; those of decoders have no number."""
    return getattr(error, "errno", None) in PASSING


def patiently(read, *arguments):
    """read(*arguments), tried again for half a minute where the disk fails.

    So a network disk that is out of reach for a moment costs no image. A bad sector fails each
    time; then the error is raised as for any damaged file.
    """
    for pause in (1, 2, 4, 8, 16):  # seconds
        try:
            return read(*arguments)
        except OSError as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return read(*arguments)


def from_array(array: np.ndarray, channels: int) -> Tensor:
    """(H, W), (C, H, W) or (H, W, C) -> (channels, H, W) as in_channels gives it.

    Numbers are integers, which are divided by the largest of their type, or floats from 0 to 1.
    ValueError for anything else.
    """
    if array.ndim not in (2, 3) or not array.size or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"an array {array.shape} of {array.dtype}, expected an image")

    # Channels come first if the first axis has the number that is wanted. Otherwise they come last
    # if the last axis has it, or is the shorter of the two: (20, 30, 5) is 5 channels of 20 x 30
    # pixels.
    first = array.shape[0]
    last = array.shape[-1]
    if array.ndim == 3 and first != channels and (last == channels or last < first):
        array = array.transpose(2, 0, 1)
    if np.issubdtype(array.dtype, np.integer):
        # Integers of numpy have 64 bits unless one asks for fewer: an image of bytes that was
        # stored so would be black.
        if array.dtype.itemsize > 2:
            raise ValueError(
                f"an array of {array.dtype}, expected integers of 8 or 16 bits, or "
                "floats from 0 to 1")
        array = array / np.float32(np.iinfo(array.dtype).max)
    image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    # Written so that NaN, for which every comparison is false, is refused as well.
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"values from {image.min():g} to {image.max():g}, expected 0 to 1, or "
                         "integers of 8 or 16 bits")
    return in_channels(image if image.ndim == 3 else image[None], channels)


def in_channels(image: Tensor, channels: int) -> Tensor:
    """(c, H, W), uint8 or floats from 0 to 1 -> (channels, H, W), in the type that suits.

    Three channels are uint8, as photographs come; any other number is floats from 0 to 1, which
    keep all 16 bits of a camera. A grey image becomes three equal channels, a colour image its
    brightness (luma). ValueError where neither makes the number right.
    """
    if len(image) == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        image = luma(_as_floats(image)[None])[0]
    if len(image) != channels:
        raise ValueError(f"{len(image)} channels, expected --in_chans {channels}")
    if channels != 3:
        return _as_floats(image)
    return image if image.dtype == torch.uint8 else (image * 255).round().byte()


def _as_floats(image: Tensor) -> Tensor:
    """Bytes from 0 to 255 as floats from 0 to 1; floats as they are."""
    return image / 255 if image.dtype == torch.uint8 else image
