"""Describes a W&B workspace for runs of this package as plain data, and sends it to the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nslightning.report import chart

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

__all__ = ["CHARTS", "METRICS", "apply", "definition", "workspace"]

#: The step that Lightning counts; W&B's own goes on at every call that logs, callbacks' calls included.
STEP = "trainer/global_step"

#: The metrics of the panels, by section and panel: the name of a metric, or a regular expression (from ``^`` on) where
#: the name holds one of a choice, a site or a twin; and whether the axis is logarithmic.
METRICS: dict[str, dict[str, tuple[str, bool]]] = {
    "Loss and accuracy by choice": {
        "Validation loss": ("val/loss", False),
        "Validation accuracy": ("val/acc1", False),
        "Validation accuracy, top 5": ("val/acc5", False),
        "Training loss": ("train/loss", False),
        "Training accuracy": ("train/acc1", False),
        "Twins: validation accuracy": (r"^val/[^/]+/acc1$", False),
        "Twins: training loss": (r"^train/[^/]+/loss$", True),
    },
    "Divergence by choice": {
        "Relative L2 divergence": (r"^divergence/[^/]+/relative$", True),
        "Largest absolute difference": (r"^divergence/[^/]+/linf$", True),
        "Cosine": (r"^divergence/[^/]+/cosine$", False),
        "Seconds for one measurement": ("divergence/seconds", True),
    },
    "Speed": {
        "Images per second": ("perf/images_per_second", False),
        "Share of the time that waits for data": ("perf/data_wait", False),
        "Peak memory (GiB)": ("perf/memory_gib", False),
    },
    "Ties": {
        "Tied share of evaluations, by site": (r"^ties/(?!total$).+", True),
        "Tied share of evaluations, all sites": ("ties/total", True),
    },
    "Zones": {
        "Bifurcation: 1 where the choices differ": (r"^zones/[^/]+/bifurcation$", False),
        "Compensation: 1 where they differ by rounding": (r"^zones/[^/]+/compensation$", False),
        "Difference over the reals": (r"^zones/[^/]+/difference$", True),
    },
    "Weights of twins": {
        "L1 distance of the weights": (r"^weights/[^/]+/l1$", True),
        "Relative L2 distance of the weights": (r"^weights/[^/]+/relative$", True),
        "Relative L2 distance of the gradients": (r"^gradients/[^/]+/relative$", True),
        "L1 distance to the reference": ("weights/l1", True),
    },
}

#: Panels drawn by the Vega-Lite specs of this package: the spec, and the section, the table that a callback logs, and
#: the columns of it that are drawn.
CHARTS = {
    "layers": ("Divergence by layer and step", "divergence/per_layer", ("step", "choice", "parameter", "relative"))
}

# The choices and the settings by which runs are told apart, as RunRecord writes them into a run's config.
_GROUPS = ("config.model.jacobians.relu", "config.model.jacobians.max_pool")
_COLUMNS = (*_GROUPS, "config.model.backbone", "run.precision", "run.seed", "run.patch.fingerprint", "run.git")
_RESULTS = ("val/acc1", "val/loss")


def workspace(entity: str, project: str, name: str = "nslightning") -> Workspace:
    """Make the workspace: sections with a panel for each value that the callbacks log.

    Runs are grouped by their Jacobian choice, so that a panel draws a line with its spread for each choice, over seeds.

    Args:
        entity: The user or team.
        project: The project.
        name: Name of the view at W&B.

    Returns:
        The workspace; nothing is sent.

    Raises:
        ImportError: If the extra ``dashboard`` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2.interface as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise ImportError(
            "the workspace needs wandb-workspaces, which is not installed: pip install 'nslightning[dashboard]'"
        ) from error

    def line(title: str, metric: str, log: bool) -> Any:
        named = {"metric_regex": metric} if metric.startswith("^") else {"y": [metric]}
        return wr.LinePlot(title=title, x=STEP, log_y=log, **named)

    sections = [
        ws.Section(name=section, is_open=True, panels=[line(title, *panel) for title, panel in panels.items()])
        for section, panels in METRICS.items()
    ]
    heat_maps = [
        ws.Section(
            name=section,
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=1, rows=1),
            panels=[
                wr.CustomChart(
                    query={"historyTable": {"tableKey": table, "tableColumns": list(columns)}},
                    chart_name=f"{entity}/{_chart_name(spec)}",
                    chart_fields={},
                    chart_strings={},
                )
            ],
        )
        for spec, (section, table, columns) in CHARTS.items()
    ]
    place = list(METRICS).index("Divergence by choice") + 1
    runs = ws.Section(name="Settings of the runs", panels=[wr.RunComparer(diff_only="split")])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*sections[:place], *heat_maps, *sections[place:], runs],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=20),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(key) for key in _GROUPS],
            # The server keeps a config's values under `value`, below the first name.
            pinned_columns=[
                *(f"config:{key.replace('.', '.value.', 1)}" for key in _COLUMNS),
                *(f"summary:{metric}" for metric in _RESULTS),
            ],
        ),
    )


def _chart_name(spec: str) -> str:
    return f"nslightning-{spec}"


def definition(entity: str, project: str, name: str = "nslightning") -> dict[str, Any]:
    """All that W&B needs to show the workspace, as plain data; made without a connection.

    Args:
        entity: The user or team.
        project: The project.
        name: Name of the view at W&B.

    Returns:
        ``charts``: the Vega-Lite specs by the name they get at W&B; ``workspace``: the view as the server stores it.

    Raises:
        ImportError: If the extra ``dashboard`` is not installed.
    """
    view = workspace(entity, project, name)._to_model()
    return {
        "charts": {_chart_name(spec): chart(spec) for spec in CHARTS},
        "workspace": view.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def apply(entity: str, project: str, name: str = "nslightning") -> str:
    """Put the charts and the workspace on the server.

    Args:
        entity: The user or team.
        project: The project.
        name: Name of the view at W&B.

    Returns:
        The workspace's address.

    Raises:
        ImportError: If the extra ``dashboard`` is not installed.
    """
    import wandb

    view = workspace(entity, project, name)
    api = wandb.Api()
    for spec in CHARTS:
        api.create_custom_chart(
            entity=entity,
            name=_chart_name(spec),
            display_name=f"nslightning: {spec}",
            spec_type="vega2",
            access="private",
            spec=chart(spec),
        )
    view.save()
    return str(view.url)
