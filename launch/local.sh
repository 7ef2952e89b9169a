#!/usr/bin/env bash
# One process on this machine, all its devices.
#   launch/local.sh configs/crmt.py:digits runs/crmt [--config.key=value ...]
set -euo pipefail
config=${1:?usage: local.sh CONFIG WORKDIR [overrides]}
workdir=${2:?usage: local.sh CONFIG WORKDIR [overrides]}
shift 2
exec robust-mm train --config="$config" --workdir="$workdir" "$@"
