"""The one way to draw something, where matplotlib is installed."""


def figure(columns=1):
    """(figure, axes) to draw into and save; raises ImportError that says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, columns, figsize=(7, 4.5) if columns == 1 else (10, 4), layout="constrained")


def save(figure, path):
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
