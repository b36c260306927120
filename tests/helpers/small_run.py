"""The small run into which tests/faults/ injects faults."""

STEPS, SAVE = 30, 4
LIMIT = 600  # seconds after which a run counts as hanging
SOON = "timeout_seconds=20"  # for a rank that hangs; on a busy machine ranks start some seconds apart
RESTARTS = ["--max-restarts=2", "--shutdown-timeout=5"]


def write_config(path, tasks, run_dir, delay):
    path.write_text(
        f"""
tasks: [a, b]
episodes: {STEPS // 5}
inner_steps: 5
meta_lr: 0.5
method: {{delay: {delay}}}
batch_size: 8
log_every: 5
reduction: ordered
timeout_seconds: 60
run_dir: {run_dir}
device: cpu
model: {{name: tiny}}
data: {{root: {tasks}}}
checkpoint: {{every_steps: {SAVE}}}
"""
    )
    return path


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]
