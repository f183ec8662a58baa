"""The processes of torchrun find each other, again after one of them has failed."""

import os
import subprocess
import sys

import pytest

# Of one process. The second fails at first; all say at the end which attempt it is.
PROGRAM = """
import os, sys
from pathlib import Path
from torch import distributed
from sinkattn.hf.process_group import begin_process_group

begin_process_group()
begin_process_group()  # of no effect
distributed.barrier()
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], distributed.get_rank()
if (attempt, rank) == ("0", 1):
    os._exit(1)
distributed.barrier()
Path(sys.argv[1], f"{attempt}-{rank}").touch()
"""


@pytest.mark.slow
def test_processes_find_each_other_after_a_restart(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = tmp_path / "done"
    done.mkdir()
    words = ["--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "torch.distributed.run", *words, str(tmp_path / "program.py"), str(done)]
    subprocess.run(program, env=environment, check=True, timeout=60)
    assert sorted(x.name for x in done.iterdir()) == ["1-0", "1-1"]
