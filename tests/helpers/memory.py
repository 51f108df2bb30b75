"""Memory that a pass keeps for backward."""

from benchmarks.measure import saved_bytes as bytes_of_graph


def saved_bytes(model, x):
    """Bytes kept for backward, each storage once, parameters and the input not counted; and the output."""
    outputs = []

    def forward():
        outputs.append(model(x))
        return outputs[0]

    nbytes = bytes_of_graph(forward, [*model.parameters(), x])
    return nbytes, outputs[0]
