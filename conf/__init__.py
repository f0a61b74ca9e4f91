"""The choices: Hydra groups as YAML files, no logic."""
