import pytest


@pytest.fixture
def no_figures(monkeypatch):
    """Pages of audits without their figures, which take most of a page's time."""
    monkeypatch.setattr("dori_lightning.report.pages.audit_figures", lambda _: {})
