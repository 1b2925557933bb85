"""Pictures of learned functions."""
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vision_kan.analysis.functions import group_functions
from vision_kan.analysis.inputs import FAR_WIDER, InputHistogram, used_width
from vision_kan.analysis.measures import base_distances, drawn_range, edge_functions
from vision_kan.layers.function_layer import FunctionLayer

GROUPS = 8              # drawn of each layer


def draw_functions(axes: Axes, name: str, layer: FunctionLayer, inputs: InputHistogram | None = None) -> None:
    """Draw a layer's functions, over the histogram of their inputs if given."""
    (draw_edges if layer.per_edge else draw_groups)(axes, name, layer, inputs)


def draw_groups(axes: Axes, name: str, phi: FunctionLayer, inputs: InputHistogram | None = None) -> None:
    """Draw the base (dashed) and up to `GROUPS` groups' functions, those that differ most from it."""
    u = drawn_range(phi, inputs)
    base, values = group_functions(phi, u)
    distance = None if inputs is None else base_distances(phi, inputs)
    distance = (values - base).square().mean(1).sqrt() if distance is None else distance[0]
    for group in sorted(distance.topk(min(GROUPS, len(values))).indices.tolist()):
        axes.plot(u.numpy(), values[group].numpy(), label=str(group), linewidth=1.2)
    axes.plot(u.numpy(), base.numpy(), "--", color="black", linewidth=1.2, label="base")
    shown = "" if len(values) <= GROUPS else f", {GROUPS} of {len(values)}, those furthest from the base"
    _finish(axes, phi, inputs, f"{name}: the groups' functions{shown}", "learned activation φ(u)", "group")


def draw_edges(axes: Axes, name: str, layer: FunctionLayer, inputs: InputHistogram | None = None) -> None:
    """Draw the functions on the strongest edges of a layer."""
    u = drawn_range(layer, inputs)
    for label, values in edge_functions(layer, u, inputs).items():
        axes.plot(u.numpy(), values.numpy(), label=label, linewidth=1.2)
    _finish(axes, layer, inputs, f"{name}: strongest edges", "edge function φ(u)", "input → output")


def _finish(axes: Axes, layer: FunctionLayer, inputs: InputHistogram | None, title: str, ylabel: str, legend: str) -> None:
    for point in layer.grid_points().tolist() if layer.has_grid else ():
        axes.axvline(point, color="grey", linewidth=0.5, alpha=0.5)
    axes.set_xlim(*drawn_range(layer, inputs)[[0, -1]].tolist())
    notes = ["lines: grid points"] if layer.has_grid else []
    if inputs is not None:
        p5, p95 = inputs.quantile(0.05), inputs.quantile(0.95)
        if layer.has_grid:
            title += f"\n{inputs.off_grid:.1%} of the inputs off the grid"
            if (used := used_width(inputs.low, inputs.high, p5, p95)) < 1 / FAR_WIDER:
                title += f", nine in ten within {used:.0%} of its width"
        notes.append("blue: histogram of the inputs, dotted: their 5th and 95th percentile")
        for percentile in (p5, p95):
            axes.axvline(percentile, color="tab:blue", linestyle=":", linewidth=1.4)
        below = axes.twinx()
        below.stairs(inputs.shares()[0].numpy(), inputs.edges.numpy(), fill=True, color="lightsteelblue", alpha=0.6)
        below.set_ylim(0, 2.5 * float(inputs.shares()[0].max()))
        below.set_yticks([])
        axes.set_zorder(below.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.set_title(title, fontsize=9)
    words = "; ".join(notes)
    axes.set_xlabel(f"input u\n{words}" if inputs is not None else f"input u ({words})" if words else "input u", fontsize=7)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.legend(fontsize=7, title=legend, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def functions_figure(layers: Mapping[str, FunctionLayer], inputs: Mapping[str, InputHistogram] | None = None) -> Figure:
    """A figure with a panel for each layer, two in a row."""
    rows = -(-len(layers) // 2)
    figure = Figure((11, 3.4 * rows), layout="constrained")
    for place, (name, layer) in enumerate(layers.items(), 1):
        axes = figure.add_subplot(rows, 2, place, label=name)
        draw_functions(axes, name, layer, (inputs or {}).get(name))
    return figure
