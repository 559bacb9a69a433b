from tests.model.conftest import make_model, plan

__all__ = ["make_model", "plan"]
