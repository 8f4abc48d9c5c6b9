"""The base of every config class. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from t2irl.registry import mentions


class Strict(BaseModel):
    """Base of every config class: unknown keys are errors, values are frozen, docs stand under the fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, data: Any) -> Any:
        # pydantic would read true as 1; as text it is refused like any other text.
        if not isinstance(data, dict):
            return data
        return {key: str(value).lower() if cls._misplaced_bool(key, value) else value for key, value in data.items()}

    @classmethod
    def _misplaced_bool(cls, key: str, value: Any) -> bool:
        if not isinstance(value, bool) or key not in cls.model_fields:
            return False
        annotation = cls.model_fields[key].annotation
        return mentions(annotation, int, float) and not mentions(annotation, bool)
