"""The command line of the generator."""

import io
import os
import re
import subprocess
import sys

import pytest

from based_model import generate
from based_model.checkpoint import save_checkpoint
from based_model.cli import run_cli
from test_generate import tiny_model
from training import one_thread_fixture  # noqa: F401


@pytest.fixture
def checkpoint(tmp_path):
    """A run with one checkpoint, of a model that only writes printable ASCII."""
    model = tiny_model()
    model.embedding.weight[:32] *= 0.01
    model.embedding.weight[127:] *= 0.01
    return save_checkpoint(tmp_path / "run", 1, model).parent


@pytest.fixture
def cli(checkpoint, monkeypatch, capsys):
    """Runs the command line: (standard output, standard error)."""
    pytest.importorskip("tyro")

    def call(*args, stdin=""):
        argv = ["generate", "--checkpoint", checkpoint, "--max-new-tokens", "12", *args]
        monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
        stream = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stream)))
        run_cli(generate.GenerateConfig, generate.run, prog="generate")
        sys.stdout.flush()
        return tuple(capsys.readouterr())

    return call


def test_cli_streams_one_prompt_and_is_seeded(cli):
    out, _ = cli("--prompt", "def f")
    assert out.startswith("def f") and len(out.encode()) >= 5 + 12
    assert cli("--prompt", "def f") == (out, "")
    assert cli("--prompt", "def f", "--seed", 1)[0] != out
    assert cli("--prompt", "-", stdin="def f")[0] == out
    assert cli("--prompts-file", "-", stdin="def f\n")[0] == out
    assert cli("--prompt", "def f", "--max-new-tokens", 0)[0] == ""
    assert cli(stdin="unread")[0] == cli("--prompt", "")[0]
    assert cli("--prompt", "-", stdin=b"\xff\xfe")[0].startswith("\ufffd\ufffd")


def test_cli_reports_the_state_and_the_time(cli):
    out, err = cli("--prompt", "def f", "--report-every", 5)
    assert out == cli("--prompt", "def f")[0]
    size = f"{tiny_model().state_size(1):,} bytes of state"
    reports = re.findall(r"\[(\d+) tokens: (.*), \d+\.\d+ ms per token\]", err)
    assert reports == [("5", size), ("10", size)]


def test_cli_prints_several_prompts_one_under_the_other(cli, tmp_path):
    greedy = ("--temperature", 0)
    first, second = (cli("--prompt", p, *greedy)[0][len(p) : -1] for p in ("a", "the end"))
    blocks = (
        f"===== prompt 1\na\n----- continuation 1\n{first}\n"
        f"===== prompt 2\nthe end\n----- continuation 1\n{second}\n"
    )
    assert cli("--prompt", "a", "--prompt", "the end", *greedy)[0] == blocks
    (tmp_path / "prompts").write_text("a\n\nthe end")
    assert cli("--prompts-file", tmp_path / "prompts", *greedy)[0] == blocks
    assert cli("--prompts-file", "-", *greedy, stdin="a\nthe end\n")[0] == blocks

    out, _ = cli("--prompt", "a", "--samples", 2, *greedy)
    assert out == (
        f"===== prompt 1\na\n----- continuation 1\n{first}\n----- continuation 2\n{first}\n"
    )
    out, _ = cli("--prompt", "a", "--samples", 2)
    assert len(set(out.split("----- continuation ")[1:])) == 2


def test_cli_continues_a_saved_state(cli, tmp_path):
    state = tmp_path / "state"
    whole, _ = cli("--prompt", "import os")
    out, err = cli("--prompt", "import os", "--save-state", state)
    assert out == whole and err == f"{state}: {state.stat().st_size:,} bytes of state\n"
    assert "import os" + cli("--load-state", state)[0] == whole

    cli("--prompt", "import ", "--save-state", state, "--max-new-tokens", 0)
    assert "import " + cli("--load-state", state, "--prompt", "os")[0] == whole
    out, _ = cli("--load-state", state, "--prompt", "os", "--prompt", "re", "--temperature", 0)
    assert "===== prompt 1\nos\n" in out and "===== prompt 2\nre\n" in out

    cli("--prompt", "a", "--prompt", "bc", "--save-state", state, "--max-new-tokens", 0)
    both, _ = cli("--load-state", state)
    assert both.count("===== prompt") == 2


def test_cli_errors_are_one_line(cli, capsys, tmp_path):
    (tmp_path / "torn").write_bytes(b"{")
    for args, message in (
        (("--load-state", tmp_path / "torn"), "torn: not a readable state"),
        (("--prompts-file", tmp_path / "none"), "No such file"),
        (("--samples", "0"), "samples: expected >= 1, got 0"),
        (("--tokenizer", tmp_path / "torn"), "tokenizer: "),
    ):
        with pytest.raises(SystemExit) as exit:
            cli(*args)
        err = capsys.readouterr().err
        assert exit.value.code == 2 and message in err


def test_cli_ends_quietly_when_its_reader_does(checkpoint):
    command = [sys.executable, "-m", "based_model.generate", "--checkpoint", str(checkpoint)]
    command += ["--prompt", "def f", "--max-new-tokens", "100000"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout.read(5) == b"def f"
        process.stdout.close()
        assert process.stderr.read() == b""
