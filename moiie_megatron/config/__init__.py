"""The configuration of a run: schema, presets, reading, writing and checks.

YAML is read by PyYAML and values by pydantic; merging, overrides and variables are this
package's own.  OmegaConf accepts ``train.steps`` or ``a..b=1`` as overrides, replaces a value by a
mapping without an error and words neither its own errors nor pydantic's in one sentence with key,
value and remedy, so that it would replace about 60 lines and need most of the rest.
"""
