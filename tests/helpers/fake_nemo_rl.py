"""A fake of NeMo-RL's folder: its clock, and a program that computes nothing but asks every node of a real Ray."""

from __future__ import annotations

from pathlib import Path

# The clock of NeMo-RL's loops, as nemo_rl/utils/timer.py of v0.7.0 has it: it begins when it is made.
FAKE_TIMER = """\
import time
class TimeoutChecker:
    def __init__(self, timeout="00:03:45:00", fit_last_save_time=False):
        self.last_save_time = float("inf")
        if timeout is not None:
            days, hours, minutes, seconds = map(int, timeout.split(":"))
            self.last_save_time = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        self.start_time = time.time()
    def check_save(self):
        return time.time() - self.start_time >= self.last_save_time
"""
# Goes on from the newest step_N, asks a task on every node in each step, and saves as NeMo-RL does.
FAKE_PROGRAM = """\
import json, os, sys, time, yaml, ray
from nemo_rl.utils.timer import TimeoutChecker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

config = yaml.safe_load(open(sys.argv[2]))
saving, root = config["checkpointing"], config["checkpointing"]["checkpoint_dir"]
ray.init(address="auto", log_to_driver=True, include_dashboard=False)
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
assert len(nodes) == config["cluster"]["num_nodes"], nodes

@ray.remote(num_cpus=0.1, max_retries=0)
def where(step):
    import resource
    return ray.get_runtime_context().get_node_id(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]

timeout = TimeoutChecker(timeout=saving["checkpoint_must_save_by"], fit_last_save_time=True)
begin = max([int(name[5:]) for name in os.listdir(root) if name.startswith("step_")], default=0)
print("begins after step", begin, flush=True)
for step in range(begin + 1, config["dpo"]["max_num_steps"] + 1):
    found = ray.get([where.options(scheduling_strategy=On(node, soft=False)).remote(step) for node in nodes])
    assert [node for node, _ in found] == nodes
    time.sleep({seconds})
    over = timeout.check_save()
    if over or step % saving["save_period"] == 0 or step == config["dpo"]["max_num_steps"]:
        os.makedirs(f"{{root}}/tmp_step_{{step}}/policy")
        with open(f"{{root}}/tmp_step_{{step}}/training_info.json", "w") as out:
            json.dump({{"nodes": nodes, "open_files": [files for _, files in found], "begin": begin}}, out)
        os.rename(f"{{root}}/tmp_step_{{step}}", f"{{root}}/step_{{step}}")
    if over:
        break
"""


def make(folder: Path, seconds: float) -> Path:
    """NeMo-RL's package and examples below `folder`; a step of the program takes `seconds`."""
    (folder / "nemo_rl" / "utils").mkdir(parents=True)
    (folder / "nemo_rl" / "utils" / "timer.py").write_text(FAKE_TIMER)
    for package in ("nemo_rl", "nemo_rl/utils"):
        (folder / package / "__init__.py").write_text("")
    (folder / "examples" / "configs").mkdir(parents=True)
    (folder / "examples" / "configs" / "dpo.yaml").write_text("{}\n")
    (folder / "examples" / "run_dpo.py").write_text(FAKE_PROGRAM.format(seconds=seconds))
    return folder
