"""The one way to draw something, where matplotlib is installed."""

from data import files
from model import Refused


def figure(columns=1):
    """(figure, axes) to draw into and save; raises Refused that says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise Refused("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, columns, figsize=(7, 4.5) if columns == 1 else (10, 4), layout="constrained")


def save(figure, path):
    import matplotlib.pyplot as plt
    files.replace(path, lambda part: figure.savefig(part, format="png", dpi=120, bbox_inches="tight"))
    plt.close(figure)
