"""The lengths of prompts, before a run."""

import re
from io import BytesIO

import pytest
from PIL import Image, ImageFile
from qwen import qwen_folder

from data.chat import Chat
from data.images import open_picture
from data.lengths import SAMPLE, TooLong, check_prompts
from data.types import BadPicture, Example


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def folder(request, tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("lengths") / request.param, request.param)


def jpeg(width: int, height: int, turned: bool = False) -> bytes:
    image, buffer = Image.new("RGB", (width, height)), BytesIO()
    exif = image.getexif()
    if turned:
        exif[0x0112] = 6
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def asks(*pictures, text="What is there?", uid="x") -> Example:
    return Example(uid, text, (), "a cup", pictures=pictures)


def test_a_length_is_that_of_the_prompt(folder, tmp_path):
    """Without unpacking a picture: turned by EXIF, in a file, drawn, several, none."""
    (tmp_path / "a.jpg").write_bytes(jpeg(90, 200))
    chat = Chat(folder, template="chatml", max_prompt=99_999, max_pixels=50_000)
    for example in (
        asks(jpeg(300, 200)),
        asks(jpeg(301, 97, turned=True)),
        asks(tmp_path / "a.jpg", jpeg(20, 20), text="<image> or <image>?"),
        asks(lambda: Image.new("RGB", (64, 128))),
        asks(),
    ):
        tokens, counts = chat.length(example)
        prompt = chat.prompt(example)
        assert tokens == len(prompt.tokens)
        assert counts == (prompt.grid.prod(1) // chat.pictures.merge**2).tolist()
    with pytest.raises(BadPicture, match="example 'x', picture 1.*cannot be read"):
        chat.length(asks(b"no picture"))


def test_no_picture_is_unpacked(folder, monkeypatch):
    picture = jpeg(300, 200)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("unpacked"))
    Chat(folder, template="chatml").length(asks(picture))


def proposed(said: str) -> dict[str, int]:
    return {
        key: int(value)
        for key, value in re.findall(r"(max_prompt|max_pixels)=(\d+)", said.partition("set ")[2])
    }


def test_most_too_long_is_refused_with_settings_that_help(folder):
    """With either of the proposed settings the same questions can be asked."""
    examples = [asks(jpeg(400 + 10 * i, 500), uid=str(i)) for i in range(10)]
    chat = Chat(folder, template="chatml", max_prompt=350, max_pixels=1_000_000)
    with pytest.raises(TooLong, match="10 of 10 questions are longer than max_prompt=350, and none") as error:
        check_prompts(chat, examples)
    helps = proposed(str(error.value))
    assert helps.keys() == {"max_prompt", "max_pixels"}
    assert (
        check_prompts(
            Chat(folder, template="chatml", max_prompt=helps["max_prompt"], max_pixels=1_000_000), examples
        )
        == ""
    )
    assert (
        check_prompts(
            Chat(folder, template="chatml", max_prompt=350, max_pixels=helps["max_pixels"]), examples
        )
        == ""
    )
    # no picture is small enough for a limit below the words
    with pytest.raises(TooLong) as error:
        check_prompts(Chat(folder, template="chatml", max_prompt=20), examples)
    assert proposed(str(error.value)).keys() == {"max_prompt"}


def test_a_few_too_long_are_counted(folder):
    chat = Chat(folder, template="chatml", max_prompt=400)
    examples = [
        asks(jpeg(50, 50), text="long " * (100 if i % 100 == 0 else 1), uid=str(i)) for i in range(1000)
    ]
    said = check_prompts(chat, examples)
    assert re.match(
        rf"\d+ of {SAMPLE} questions that were looked at are longer than max_prompt=400, and will be", said
    )
    assert (
        check_prompts(Chat(folder, template="chatml", max_prompt=proposed(said)["max_prompt"]), examples)
        == ""
    )
    assert check_prompts(chat, examples[1:100]) == "" == check_prompts(chat, [asks(b"bad")])


def test_sizes_are_those_of_opened_pictures():
    from data.images import size_of

    for turned in (False, True):
        opened = open_picture(jpeg(30, 50, turned), name="x").size
        assert sorted(size_of(jpeg(30, 50, turned), name="x")) == sorted(opened)
