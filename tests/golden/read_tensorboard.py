"""Prints what TensorBoard reads from a folder of event files, as JSON: {tag: [[step, value], ...]}.

    pip install tensorboard
    python read_tensorboard.py FOLDER
"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

accumulator = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
accumulator.Reload()
scalars = {
    tag: [[event.step, repr(event.value)] for event in accumulator.Scalars(tag)]
    for tag in accumulator.Tags()["scalars"]
}
print(json.dumps(scalars))
