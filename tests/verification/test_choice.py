"""What a verdict is good for: the choice that follows, what is said of it, and the files that it is read from."""

import datetime
import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stand_ins import CPU, answering, prepare, stand_in

import fastnce
from fastnce import backends, cli, doctor, verification
from fastnce.backends import native, verdicts
from fastnce.backends.verdicts import Entry
from fastnce.errors import UserError
from fastnce.training import loop
from fastnce.verification import report

FP32 = torch.float32
FAST = dict.fromkeys(verdicts.SIZES, 2.0)


def chosen(dtype: torch.dtype = FP32, *, grad: bool = True, **options: object) -> str:
    """The backend of an ``info_nce`` with both gradients, or of its keys' alone."""
    query, key = (torch.eye(4, dtype=dtype).requires_grad_(needs) for needs in (True, grad))
    seen = []
    select = backends.select

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backends, "select", lambda *a: seen.append(select(*a)) or seen[0])
        fastnce.info_nce(query, key, **options)
    return next(name for name, module in backends._TABLE.items() if module is seen[0])


def write(name: str = "triton", **speed: float) -> None:
    """A verdict on ``info_nce`` with both gradients in float32."""
    entry = Entry("right", "", {}, FAST | speed)
    verdicts.write(verdicts.key_of(name, CPU), {("info_nce", "float32", "both gradients"): entry})
    verdicts.forget()


def test_the_choice_follows_what_was_found(verified_gpu):
    """Right and faster: chosen. Wrong, as fast, failed, slow, hung or crashed: not."""
    assert chosen(torch.bfloat16) == "triton"
    assert chosen(torch.bfloat16, symmetric=True) == "triton"
    assert chosen(FP32) == "native" and chosen(torch.float16) == "native"
    x, labels = torch.eye(4, requires_grad=True), torch.tensor([0, 0, 1, 1])
    triton = backends._TABLE["triton"]
    for rows in (x, x.bfloat16()):
        pairwise = backends.select("pairwise_cosine_similarity", rows, None, rows, None)
        assert (pairwise is triton) == (rows is x)
        for op in ("sup_con", "conditional_contrastive"):
            assert backends.select(op, rows, None, (rows, rows)) is not triton
    assert fastnce.sup_con(x, labels).isfinite()


def test_nothing_is_loaded_where_nothing_was_verified(gpu, monkeypatch):
    """Triton would compile a kernel to answer, in the first call of whoever has a GPU."""
    asked = lambda *_: pytest.fail("the backend was asked")  # noqa: E731
    monkeypatch.setattr(backends._TABLE["triton"], "supports", asked)
    assert chosen(torch.bfloat16) == "native"


def test_why_not_is_told(verified_gpu):
    def why(op: str, dtype: torch.dtype = FP32, form: str = "any") -> str:
        return backends.verdict("triton", op, "cpu", dtype)[form]["small"]

    assert why("info_nce", torch.bfloat16, "keys fixed") == "ok"
    assert why("info_nce", FP32, "symmetric").startswith("wrong: temperature 0.07: d query is off")
    assert why("conditional_contrastive") == "crashed: N = 515: signal 11"
    assert why("sup_con") == "no faster: 0.30 times as fast"
    assert backends.verdict("triton", "nt_xent", "cpu", FP32) == {}
    assert backends.verdict("blocks", "info_nce", "cpu", FP32) == {}
    with pytest.raises(ValueError, match="backend='tritn' is unknown"):
        backends.verdict("tritn", "info_nce", "cpu", FP32)


def test_never_verified_one_line_says_what_would_change_it(gpu, caplog, monkeypatch):
    assert chosen() == "native" and chosen(torch.float16) == "native"
    verdicts.forget()  # another device
    assert chosen() == "native"
    (record,) = [x for x in caplog.records if x.levelno >= logging.WARNING]
    assert "not verified on this GPU" in record.getMessage()
    assert record.getMessage().endswith("Run: fastnce verify")
    assert backends.verdict("triton", "info_nce", "cpu", FP32) == {}
    assert report.choices(CPU)[0].endswith("not verified here. Run: fastnce verify")
    monkeypatch.setattr(backends._TABLE["triton"], "supports", lambda *_: "broken")
    assert report.choices(CPU)[0].startswith("blocks: neither of the GPU's own backends can run")


def test_a_process_does_not_change_its_mind(gpu):
    write()
    assert chosen() == "triton"
    gpu.unlink()
    assert chosen() == "triton"
    verdicts.forget()
    assert chosen() == "native"


def test_the_form_and_the_size_decide(gpu):
    write(small=1.5, medium=1.029, large=1.03, deep=0.5)
    assert chosen() == "triton"
    assert chosen(grad=False) == "native"  # keys fixed: not in the verdict

    def of_size(rows: int, depth: int) -> bool:
        x = torch.ones(1, 1, 1, requires_grad=True).expand(1, rows, depth)
        found = backends.select("info_nce", x, None, (x, x, None), False)
        return found is backends._TABLE["triton"]

    shapes = ((512, 128), (4096, 128), (16384, 128), (4096, 512))
    assert [of_size(*shape) for shape in shapes] == [True, False, True, False]
    assert Entry("right", "").why_not("small") == "not raced: time ran out"
    assert Entry("right", "", {}, {"small": 2.0}).why_not("large") == "not raced at this size"
    # Nothing is known of the call.
    assert backends.select("info_nce", torch.eye(3)) is native


def test_the_faster_of_two(gpu, monkeypatch):
    other = stand_in()
    monkeypatch.setattr(backends, "_TABLE", {**backends._TABLE, "cuda": other})
    write("triton", small=2.0)
    write("cuda", small=2.1)
    assert chosen() == "cuda"
    write("cuda", small=1.9)
    assert chosen() == "triton"
    assert report.choices(CPU)[0].endswith("deep triton (cuda: slower than triton)")
    other.supports = lambda *_: "not here"
    write("cuda", small=9.0)
    assert chosen() == "triton"


def test_of_sizes_that_a_compiler_keeps_variable_all_have_to_be_won(gpu):
    # The first size is compiled in: it is small, and the small race was won.
    for speed, expected in ((2.0, 3), (0.9, 1)):
        write(large=speed)
        calls = []
        kernels = backends._TABLE["triton"]
        forward = kernels.info_nce_forward
        kernels.info_nce_forward = lambda *a, f=forward, c=calls, **k: c.append(1) or f(*a, **k)
        torch._dynamo.reset()
        loss = torch.compile(fastnce.info_nce, fullgraph=True, backend="aot_eager")
        for size in (4, 8, 16):
            x = torch.eye(size, requires_grad=True)
            loss(x, x.clone()).backward()
        kernels.info_nce_forward = forward
        assert len(calls) == expected


def test_float32_in_other_precisions_is_not_verified(gpu, monkeypatch):
    write()
    assert chosen() == "triton"
    monkeypatch.setattr(verdicts, "float32_products", lambda device_type: "high")
    assert chosen() == "native"


def test_on_a_cpu_nobody_asks(monkeypatch):
    monkeypatch.setattr(verdicts, "of", lambda *_: pytest.fail("a verdict was asked for"))
    assert chosen() == "native"


@pytest.mark.parametrize("field", ["backend", "gpu", "driver", "torch", "triton", "kernels"])
def test_a_verdict_holds_for_its_key_alone(gpu, field, monkeypatch, tmp_path):
    key = verdicts.key_of("triton", CPU)
    assert key.triton and key.kernels != verdicts.key_of("cuda", CPU).kernels
    other = key._replace(**{field: "other"})
    path = verdicts.write(other, {("info_nce", "float32", "any"): Entry()})
    assert path != gpu and verdicts.find(key) is None
    # One that came with the package serves any driver.
    monkeypatch.setattr(verdicts, "SHIPPED", path.parent)
    assert (verdicts.find(key) is not None) == (field == "driver")
    write()
    assert ("info_nce", "float32", "both gradients") in verdicts.find(key)  # one's own comes first


def test_the_key_names_what_runs(gpu, monkeypatch, tmp_path):
    before = verdicts.key_of("triton", CPU)
    assert before.torch == torch.__version__ and before.gpu == "Stand-in 9000"
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 9")
    assert verdicts.key_of("triton", CPU).triton == "triton 9"
    assert verdicts.key_of("cuda", CPU).triton == ""
    monkeypatch.setattr(verdicts.build, "PACKAGE", tmp_path)
    verdicts._kernels.cache_clear()
    assert verdicts.key_of("triton", CPU).kernels != before.kernels
    monkeypatch.undo()
    verdicts._kernels.cache_clear()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not used: it is damaged"),
        ('{"version": 1, "key": {"backend"', "is not used: it is damaged"),
        ("[]", "is not used: it is damaged"),
        (b"\xff\xfe", "is not used: it is damaged"),
        ({"version": 99}, "is of another version of fastnce"),
        ({"key": {"gpu": "x"}}, "is not used: it is damaged"),
        ({"found": [{"op": "info_nce"}]}, "is not used: it is damaged"),
        ({"found": [{"op": "a", "dtype": "b", "form": "c", "speed": 3}]}, "it is damaged"),
        ({"found": [{"op": "a", "dtype": "b", "form": "c", "errors": {"x": "y"}}]}, "damaged"),
        (None, "is not used: Permission denied"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_of(gpu, text, reason, caplog, monkeypatch):
    gpu.parent.mkdir()
    key = verdicts.key_of("triton", CPU)
    if isinstance(text, dict):
        text = json.dumps({"version": 1, "key": key._asdict(), "found": []} | text)
    gpu.write_bytes(text if isinstance(text, bytes) else (text or "").encode())
    if text is None:  # root may read everything
        read = type(gpu).read_text
        refusing = lambda path, **how: (refuse if path == gpu else read)(path, **how)  # noqa: E731
        monkeypatch.setattr(type(gpu), "read_text", refusing)
    assert chosen() == "native" and chosen() == "native"
    lines = [x.getMessage() for x in caplog.records if str(gpu) in x.getMessage()]
    assert len(lines) == 1 and reason in lines[0] and lines[0].endswith("Run: fastnce verify")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_verdict_is_written_whole_or_not_at_all(gpu, monkeypatch):
    write()
    before = gpu.read_text()
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        write(small=9.0)
    assert gpu.read_text() == before and [x.name for x in gpu.parent.iterdir()] == [gpu.name]


def rank(number: int, folder: str, connection) -> None:
    """Rank 0 has a verdict in its cache, rank 1 another one."""
    monkeypatch = pytest.MonkeyPatch()
    prepare(monkeypatch, Path(folder) / str(number))
    timeout = datetime.timedelta(minutes=5)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, rank=number, world_size=2, timeout=timeout)
    began = answering(monkeypatch, status="right", speed=FAST)
    found = []
    if number == 1:
        write(small=0.5, medium=0.5, large=0.5, deep=0.5)
        found.append(chosen())
    verification.verify(progress=False)
    found.append(chosen())
    if number == 1:  # a GPU of another kind
        monkeypatch.setattr(verdicts, "machine", lambda device: ("Stand-in 8000", "1.0"))
        verdicts.forget()
    verification.verify_once(CPU)
    found.append(chosen())
    if number == 0:
        monkeypatch.setattr(verification, "_verify", refuse)
    try:
        verification.verify(progress=False)
    except PermissionError as error:
        found.append(str(error))
    assert bool(began) == (number == 0), "rank 1 verifies"
    connection.send(found)
    dist.destroy_process_group()


def test_ranks_agree_on_the_verdict_of_rank_0(tmp_path):
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for number in range(2):
        ends.append(context.Pipe())
        processes.append(context.Process(target=rank, args=(number, str(tmp_path), ends[-1][1])))
        processes[-1].start()
    error = "[Errno 13] Permission denied"
    assert ends[0][0].recv() == ["triton", "triton", error]
    assert ends[1][0].recv() == ["native", "triton", "native", error]
    for process in processes:
        process.join()


def test_training_on_a_gpu_verifies_first_unless_told_not_to(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(loop, "verify_once", lambda device: done.append(device.type))
    monkeypatch.setattr(loop, "_train", lambda config, *_: done.append("train"))
    words = ["train", "cut", "--preset", "digits", "--data", str(tmp_path), "--out"]
    for kind, verified in {"cpu": [], "cuda": ["cuda"]}.items():
        device = torch.device(kind)
        monkeypatch.setattr(loop, "joined_from_environment", lambda _, device=device: device)
        assert cli.main([*words, str(tmp_path / kind)]) == 0
        assert done == [*verified, "train"]
        done.clear()
    assert cli.main([*words, str(tmp_path / "x"), "--no-verify"]) == 0
    with fastnce.use_backend("torch"):
        assert cli.main([*words, str(tmp_path / "y")]) == 0
    assert done == ["train"] * 2


def test_no_verify_is_no_part_of_a_run(capsys):
    words = ["train", "cut", "--data", "x", "--out", "y", "--dry-run"]
    cli.main(words)
    before = capsys.readouterr().out
    assert cli.main([*words, "--no-verify"]) == 0
    assert capsys.readouterr().out == before and "verify" not in before


def test_doctor_tells_what_a_gpu_would_use(verified_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in 9000")
    text = doctor.report()
    assert "Chosen on cpu, Stand-in 9000:" in text
    sizes = "small and medium and large and deep"
    for line in (
        f"info_nce bfloat16, symmetric: {sizes} triton",
        f"sup_con float32, any: {sizes} blocks (triton: no faster: 0.30 times as fast)",
        "conditional_contrastive float32, any: blocks (triton: crashed: N = 515: signal 11)",
    ):
        assert f"  {line}\n" in text
