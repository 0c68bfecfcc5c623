# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that want to do harm: each is refused in words, and nothing of it runs."""

import builtins
import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict

import edm_reference
import numpy as np
import pytest
import torch
from edm_reference import EDMPrecond, OpenAINet, nvidia_pickle, openai_state_dict

from diffusers_msd.untrusted import SavedModule, SavedTensor, read_checkpoint


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refused(tmp_path, content: bytes) -> str:
    """The error of a file of these bytes; it must be a plain one."""
    path = tmp_path / "hostile"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^checkpoint: ") as error:
        read_checkpoint(path)
    return str(error.value)


def saved(value, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


# The ways a checkpoint can come in, around something hostile.
WRAPPERS = {
    "bare": pickle.dumps,
    "protocol 2": lambda evil: pickle.dumps(evil, protocol=2),
    "beside the network": lambda evil: pickle.dumps({"ema": None, "loss_fn": [{"a": (evil,)}]}),
    "inside of an allowed call": lambda evil: pickle.dumps(Call(torch._utils._rebuild_parameter, evil, True, {})),
    "inside of a tensor": lambda evil: pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, evil, 0, (1,), (1,), False, OrderedDict())
    ),
    "bytes of a storage": lambda evil: pickle.dumps(Call(torch.storage._load_from_bytes, pickle.dumps(evil))),
    "storage within a storage": lambda evil: pickle.dumps(
        Call(
            torch.storage._load_from_bytes,
            saved(
                {"a": Call(torch.storage._load_from_bytes, pickle.dumps(evil))}, _use_new_zipfile_serialization=False
            ),
        )
    ),
    "torch.save": lambda evil: saved({"input_blocks.0.0.weight": evil}),
    "torch.save, old": lambda evil: saved({"input_blocks.0.0.weight": evil}, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__"]
)
def test_code_is_refused_by_name_and_does_not_run(tmp_path, name, wrapper):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')"
    evil = {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        # The first step from anything to everything.
        "builtins.getattr": Call(getattr, Call(getattr, "", "__class__"), "mro"),
        "builtins.__import__": Call(builtins.__import__, "os"),
    }[name]
    error = refused(tmp_path, WRAPPERS[wrapper](evil))
    # Protocol 2 knows the module by its older name; within a storage no call is allowed at all.
    assert name.replace("builtins", "") in error.replace("__builtin__", "") or "_load_from_bytes" in error
    assert not marker.exists()


def test_the_harm_is_real(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Call(os.system, f"touch {marker}")))
    assert marker.exists()


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Call(functools.partial, print), "functools.partial"),
        (Call(operator.attrgetter, "a.b"), "operator.attrgetter"),
        (Call(importlib.import_module, "this"), "importlib.import_module"),
        (Call(copyreg._reconstructor, object, object, None), "copyreg._reconstructor"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (Call(torch.hub.load, "x", "y"), "torch.hub.load"),
        (Call(np.load, "x"), "numpy.load"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Call(np.frombuffer, b"1234"), "numpy.frombuffer"),
    ],
)
def test_whatever_is_not_on_the_list_is_refused_by_name(tmp_path, evil, name):
    assert f"the name '{name}' is refused" in refused(tmp_path, pickle.dumps({"ema": evil})) or "numpy" in name


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"cos\nsystem\n(tR.", "os.system"),
        (b"(ios\nsystem\n.", "os system"),  # INST
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x04\x8c\x05torch\x8c\x1bstorage._load_from_bytes.os\x93.", "torch.storage._load_from_bytes.os"),
        (b"\x80\x04K\x01K\x02\x93.", "no text"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of 'torch.FloatStorage'"),
        (b"\x80\x02U\x01aQ.", "refused"),
        (b"\x80\x02K\x01Q.", "BINPERSID"),
        (b"\x80\x02}(K\x01u.", ""),  # a key without value
        (b"\x80\x02R.", ""),
        (b"\x80\x02t.", ""),
        (b"\x80\x02h\x05.", ""),
        (b"\x80\x02]K\x01b" + b"0" * 5 + b".", "POP"),
        (b"", ""),
        (b"PK\x03\x04 and no zip", "BadZipFile"),
        (b"<html>404</html>", ""),
    ],
)
def test_single_instructions(tmp_path, content, text):
    assert text in refused(tmp_path, content)


def test_names_that_are_allowed_are_never_imported(tmp_path):
    # `dnnlib` and `torch_utils` exist nowhere; `module_src` would end the process.
    assert "SystemExit" in edm_reference.MODULE_SOURCE
    path = tmp_path / "net.pkl"
    path.write_bytes(nvidia_pickle(EDMPrecond(labels=0)))
    net = read_checkpoint(path)["ema"]
    assert isinstance(net, SavedModule) and net.class_name == "EDMPrecond" and net.state["sigma_data"] == 0.5
    out_conv = net.entries("_modules")["model"].entries("_modules")["out_conv"]
    assert isinstance(out_conv.entries("_parameters")["weight"], SavedTensor)


def view(*arguments) -> bytes:
    """A pickled tensor of four numbers, seen as the arguments say."""
    storage = torch.arange(4.0)._typed_storage()
    return pickle.dumps({"ema": Call(torch._utils._rebuild_tensor_v2, storage, *arguments, False, OrderedDict())})


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (10**9,), (0,)),
        (2**70, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2, -2), (1, 1)),
        (0, (2.0,), (1,)),
        (0, (True,), (1,)),
        (0, (2, 2), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, [4], [1]),
    ],
)
def test_views_outside_of_their_numbers_are_refused(tmp_path, arguments):
    assert "a tensor" in refused(tmp_path, view(*arguments))


def test_views_inside_are_as_torch_makes_them(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(view(1, (2, 1), (2, 7)))
    assert read_checkpoint(path)["ema"].build().tolist() == [[1.0], [3.0]]
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64).T,
        "b": torch.arange(5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(2, 2).half()[:, 1],
        "bfloat16": torch.randn(7).bfloat16(),
        "one": torch.tensor(2.5),
        "flag": torch.tensor([True, False]),
    }
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        read = {name: value.build() for name, value in read_checkpoint(path).items()}
        assert all(
            torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors
        )


class Identities(pickle.Pickler):
    """Writes strings of the form "storage:n" as identities of storages of n numbers."""

    def persistent_id(self, value):
        if isinstance(value, str) and value.startswith("storage:"):
            return ("storage", torch.FloatStorage, "0", "cpu", int(value.removeprefix("storage:")), None)[
                : self.length
            ]
        return None


def announced(numel: int, length: int) -> bytes:
    buffer = io.BytesIO()
    pickler = Identities(buffer, protocol=2)
    pickler.length = length
    pickler.dump(f"storage:{numel}")
    return buffer.getvalue()


def test_a_storage_larger_than_the_file_is_refused_before_it_is_made(tmp_path):
    head = b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    body = head + announced(10**12, 6) + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 10**12) + bytes(16)
    assert "1000000000000 numbers is announced" in refused(tmp_path, body)
    assert "announced" in refused(tmp_path, pickle.dumps({"ema": Call(torch.storage._load_from_bytes, body)}))
    body = head + announced(2, 6) + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 10**12) + bytes(16)
    assert "2 were announced" in refused(tmp_path, body)
    body = head + announced(2, 6) + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 2) + bytes(7)
    assert "7 bytes" in refused(tmp_path, body)


def zipped(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_zip_bombs_are_refused(tmp_path):
    bomb = zipped({"a/data.pkl": announced(5 * 10**7, 5), "a/data/0": bytes(2 * 10**8)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**6
    assert "compressed" in refused(tmp_path, bomb)
    # One member listed many times.
    once = zipped({"a/data.pkl": announced(1000, 5), "a/data/0": bytes(4000)})
    entry = once[once.index(b"PK\x01\x02", once.index(b"PK\x01\x02") + 1) : once.index(b"PK\x05\x06")]
    many = bytearray(once.replace(entry, entry * 100))
    end = many.index(b"PK\x05\x06")
    size = struct.unpack("<I", many[end + 12 : end + 16])[0] + 99 * len(entry)
    many[end + 8 : end + 16] = struct.pack("<HHI", 101, 101, size)
    assert "larger than the file" in refused(tmp_path, bytes(many))


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"a/data.pkl": announced(10**12, 5)}, "announced"),
        ({"a/data.pkl": announced(4, 5), "a/data/0": bytes(15)}, "15 bytes"),
        ({"a/data.pkl": announced(4, 5)}, "KeyError"),
        ({"a/data.pkl": announced(4, 5), "b/data.pkl": b""}, "too many values"),
        ({"a/weights": b""}, "not enough values"),
        ({"a/data.pkl": announced(1, 5), "a/data/0": bytes(4), "a/byteorder": b"big"}, "byte order"),
    ],
)
def test_damaged_zip_files(tmp_path, members, text):
    assert text in refused(tmp_path, zipped(members))


# The hash of tuples nested so deeply ends the process.
SO_DEEP = 200_000


def deep(n: int, opcode: bytes, end: bytes = b".") -> bytes:
    return b"\x80\x04)" + opcode * n + end


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x7f" + b"0.",  # a memo of 2^31 entries
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",  # 2^62 bytes
        b"\x80\x04}" + deep(SO_DEEP, b"\x85")[2:-1] + b"K\x01s.",  # a key whose hash would overflow the stack
        b"\x80\x04\x8f(" + deep(SO_DEEP, b"\x85")[2:-1] + b"\x90.",
        b"\x80\x04" + b"(" * SO_DEEP + b".",
        # A name out of lists that contain each other twice, 60 times: 2^60 letters if it were printed.
        b"\x80\x04]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60)) + b"\x93.",
    ],
)
def test_bombs_of_few_bytes(tmp_path, content):
    assert refused(tmp_path, content)


def test_bytes_that_are_asked_for_often_do_not_multiply(tmp_path):
    storage = saved(torch.zeros(1000)._typed_storage(), _use_new_zipfile_serialization=False)
    call = pickle.dumps(Call(torch.storage._load_from_bytes, storage)).removesuffix(b".")
    # Memo 2 is the function, memo 3 the bytes.
    assert [op.name for op, *_ in pickletools.genops(call + b".")].count("MEMOIZE") == 6
    assert "more bytes than the file has" in refused(tmp_path, call + b"h\x02h\x03\x85R\x86" * 100 + b".")
    (tmp_path / "once").write_bytes(call + b".")
    assert read_checkpoint(tmp_path / "once").numel == 1000


def test_deep_nesting_is_read_and_dropped(tmp_path):
    path = tmp_path / "deep"
    path.write_bytes(b"\x80\x04" + b"]" * SO_DEEP + b"a" * (SO_DEEP - 1) + b".")
    assert len(read_checkpoint(path)) == 1


def contents() -> dict[str, bytes]:
    net = openai_state_dict(OpenAINet(channels=32, multipliers=(1,), attention=(False,)))
    small = {name: value[:1] for name, value in net.items()}
    norm = edm_reference.GroupNorm(8)
    return {
        "nvidia": nvidia_pickle(edm_reference.randomise(norm, 0)),
        "zip": saved(small),
        "old": saved(small, _use_new_zipfile_serialization=False),
    }


@pytest.mark.parametrize("kind", ["nvidia", "zip", "old"])
def test_files_cut_short_are_refused_wherever_the_cut_is(tmp_path, kind):
    content = contents()[kind]
    for cut in sorted({0, 1, 3, len(content) - 1, *random.Random(0).choices(range(len(content)), k=60)}):
        assert refused(tmp_path, content[:cut])


@pytest.mark.parametrize("kind", ["nvidia", "zip", "old"])
def test_changed_bytes_are_read_or_refused_in_words(tmp_path, kind):
    content, draw = contents()[kind], random.Random(0)
    path, outcomes = tmp_path / "changed", set()
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            read_checkpoint(path)
            outcomes.add("read")
        except ValueError as error:
            assert str(error).startswith("checkpoint: ")
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="^checkpoint: .*nothing.pkl is missing"):
        read_checkpoint(tmp_path / "nothing.pkl")
