"""Five hundred broken adapter folders: each is refused, and costs nothing."""

import json
import random
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import assert_unchanged, enlarge, snapshot, tiny_llama
from vblora_triton import AdapterFileError, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model

SAFE, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
FIELDS = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
# method -> configuration class, fields, and the field that says which of the two forms is written.
METHODS = {
    "vblora": (VBLoRAConfig, FIELDS | {"num_vectors": 10, "vector_length": 16, "topk": 3}, "save_only_topk_weights"),
    "vera": (VeraConfig, FIELDS, "save_projection"),
}
GIANT = [2**31, 2**40, 2**62, 2**63, 2**64, -1, 10**30]


pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")


@pytest.fixture
def no_hang():
    """Stop a test that takes minutes over what is refused in milliseconds, as if a claimed size were a true one."""

    def stop(*_):
        raise TimeoutError("a broken folder keeps the loader busy")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(method, file) -> folders of sound adapters, in each form."""
    folders = {}
    for method, (make, fields, form) in METHODS.items():
        for name in (SAFE, BIN):
            folders[method, name] = [tmp_path_factory.mktemp("adapter") for _ in range(2)]
            for which, folder in zip((True, False), folders[method, name], strict=True):
                model = get_peft_model(tiny_llama(), make(**fields, **{form: which}))
                enlarge(model).save_pretrained(folder, safe_serialization=name == SAFE)
    return folders


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# Each breaks one of the two files of a folder, for certain.


def truncate(draw, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def flip_header(draw, path: Path) -> None:
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    # Neither in the metadata, which say nothing of the tensors, nor in the blanks at the end.
    metadata = data.index(b'"pt"')
    places = [n for n in range(end) if not metadata - 24 <= n < metadata + 5 and data[n] != ord(" ")]
    for place in draw.sample(places, draw.randint(1, 4)):
        data[place] ^= draw.randint(1, 255)
    path.write_bytes(bytes(data))


def flip_exponents(draw, path: Path) -> None:
    """Make one value NaN or infinite: all bits of its exponent set."""
    tensors = load_file(path)
    key = draw.choice([key for key, t in tensors.items() if t.is_floating_point()])
    flat = tensors[key].reshape(-1).contiguous().view(torch.int32)
    flat[draw.randrange(flat.numel())] = draw.choice([0x7F800000, 0x7F800001, 0x7FFFFFFF])
    tensors[key] = flat.view(torch.float32).reshape(tensors[key].shape)
    save_file(tensors, path)


def drop_keys(draw, path: Path) -> None:
    tensors = load_file(path)
    for key in draw.sample(sorted(tensors), draw.randint(1, len(tensors))):
        del tensors[key]
    save_file(tensors, path)


def rename_keys(draw, path: Path) -> None:
    tensors = load_file(path)
    for key in draw.sample(sorted(tensors), draw.randint(1, 3)):
        tensors[draw.choice([key[1:], key + ".x", key.upper(), key.replace("layers.0", "layers.7") + "_"])] = (
            tensors.pop(key)
        )
    save_file(tensors, path)


def change_dtypes(draw, path: Path) -> None:
    tensors = load_file(path)
    for key in draw.sample(sorted(tensors), draw.randint(1, 3)):
        wrong = [torch.int64, torch.bool] if tensors[key].is_floating_point() else [torch.float32, torch.bool]
        tensors[key] = tensors[key].to(draw.choice(wrong))
    save_file(tensors, path)


def change_shapes(draw, path: Path) -> None:
    tensors = load_file(path)
    for key in draw.sample(sorted(tensors), draw.randint(1, 3)):
        t = tensors[key]
        changed = [t[..., :-1], t[:1], t.flatten(), t[None], t[..., :0], t.new_zeros(()), torch.cat([t, t])]
        # Of a B that has more rows than there are outputs the first are read.
        changed = [
            c for c in changed if c.shape != t.shape and not (key.endswith("vera_B") and c.shape[1:] == t.shape[1:])
        ]
        tensors[key] = draw.choice(changed).contiguous()
    save_file(tensors, path)


def giant_shapes(draw, path: Path) -> None:
    header, body = header_of(path.read_bytes())
    for key in draw.sample(sorted(set(header) - {"__metadata__"}), draw.randint(1, 2)):
        header[key]["shape"][draw.randrange(len(header[key]["shape"]))] = draw.choice(GIANT)
        if draw.random() < 0.5:
            header[key]["data_offsets"] = [0, draw.choice(GIANT)]
    path.write_bytes(with_header(header, body))


def giant_header(draw, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", draw.choice([2**20, 2**32, 2**40, 2**63, 2**64 - 1])) + data[8:])


def odd_headers(draw, path: Path) -> None:
    _, body = header_of(path.read_bytes())
    odd = [
        b"",
        b"null",
        b"[]",
        b"{" * 5000,
        b'{"a":' * 3000,
        b'{"__metadata__": 3}',
        b"\xff\xfe",
        b'{"a": {"dtype": "F99"}}',
    ]
    path.write_bytes(with_header(draw.choice(odd), body))


def garbage(draw, path: Path) -> None:
    path.write_bytes(draw.choice([b"", draw.randbytes(draw.randint(1, 500)), b"PK\x03\x04" + draw.randbytes(40)]))


def directory_instead(draw, path: Path) -> None:
    path.unlink()
    path.mkdir()


def odd_pickle(draw, path: Path) -> None:
    odd = [[], 3, None, {"a": 3}, {3: torch.zeros(2)}, {"a": torch.zeros(2)}, {}, {"base_model.vera_A": {}}]
    torch.save(draw.choice(odd), path)


def no_json(draw, path: Path) -> None:
    odd = [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"text"',
        "{" * 10_000,
        '{"peft_type": "VBLORA", }',
        "\x00",
        '{"peft_type": NaN}',
    ]
    path.write_text(draw.choice(odd))


def wrong_fields(draw, path: Path) -> None:
    values = json.loads(path.read_text())
    odd = [None, "x", -1, 0, 2.5, [], {}, True, float("nan"), [[]], 2**70, ["nothing"]]
    names = ["r", "num_vectors", "vector_length", "topk", "target_modules", "peft_type"]
    values[draw.choice([name for name in names if name in values])] = draw.choice(odd)
    path.write_text(json.dumps(values))


def giant_fields(draw, path: Path) -> None:
    values = json.loads(path.read_text())
    values[draw.choice([name for name in ("r", "num_vectors") if name in values])] = draw.choice([2**31, 2**40, 2**62])
    path.write_text(json.dumps(values))


def other_sizes(draw, path: Path) -> None:
    values = json.loads(path.read_text())
    sizes = {"r": [1, 2, 4], "num_vectors": [9, 11, 300], "vector_length": [8, 32, 24]}
    name = draw.choice([name for name in sizes if name in values])
    values[name] = draw.choice(sizes[name])
    path.write_text(json.dumps(values))


ON_SAFE = [truncate, flip_header, flip_exponents, drop_keys, rename_keys, change_dtypes, change_shapes, giant_shapes]
ON_SAFE += [giant_header, odd_headers, garbage, directory_instead]
ON_BIN = [truncate, garbage, odd_pickle, directory_instead]
ON_CONFIG = [truncate, no_json, wrong_fields, giant_fields, other_sizes, directory_instead]
EVERY = [(SAFE, change) for change in ON_SAFE] + [(BIN, change) for change in ON_BIN]
EVERY += [(CONFIG, change) for change in ON_CONFIG]


def copied(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("file", "change"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_every_broken_folder_gives_our_error_in_little_memory_and_keeps_the_model(
    file, change, method, adapters, tmp_path, no_hang
):
    draw = random.Random(f"{method}/{file}/{change.__name__}")
    folders = adapters[method, BIN if file == BIN else SAFE]
    make, fields, _ = METHODS[method]
    model = enlarge(get_peft_model(tiny_llama(), make(**fields)), seed=3)
    plain = tiny_llama()
    before, before_plain = snapshot(model), snapshot(plain)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(-(-250 // len(EVERY))):
        folder = tmp_path / str(number)
        copied(draw.choice(folders), folder)
        change(draw, folder / file)
        # For an adapter that is there, little or nothing of the configuration counts.
        name = "default" if number % 3 == 1 and file != CONFIG else "other"
        # What does not fit the model is a ValueError, whether it comes from a file or from a user.
        with pytest.raises(ValueError if file == CONFIG else AdapterFileError) as caught:
            model.load_adapter(folder, name) if number % 3 else PeftModel.from_pretrained(plain, folder)
        assert "vblora_triton" in str(caught.traceback[-1].path), caught.value
        assert 10 < len(str(caught.value)) < 10_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 200 * 1024, f"{grown} KiB"
    assert_unchanged(model, before | {"random": torch.get_rng_state()})
    assert_unchanged(plain, before_plain | {"random": torch.get_rng_state()})
    assert list(model.peft_config) == ["default"]


def test_a_byte_flipped_in_a_pickle_loads_or_gives_our_error(adapters, tmp_path):
    """Of a .bin not every byte counts; never may anything else be raised."""
    draw, refused = random.Random(0), 0
    plain = tiny_llama()
    before = snapshot(plain)
    for number in range(40):
        folder = tmp_path / str(number)
        copied(draw.choice([*adapters["vblora", BIN], *adapters["vera", BIN]]), folder)
        data = bytearray((folder / BIN).read_bytes())
        data[draw.randrange(len(data))] ^= draw.randint(1, 255)
        (folder / BIN).write_bytes(bytes(data))
        try:
            PeftModel.from_pretrained(plain, folder).unload()
        except AdapterFileError:
            refused += 1
            assert_unchanged(plain, before | {"random": torch.get_rng_state()})
        plain.requires_grad_(True)
    assert refused > 5
