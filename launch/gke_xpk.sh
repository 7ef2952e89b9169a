#!/usr/bin/env bash
# A workload on a GKE cluster through xpk; IMAGE has robust_mm installed.
#   CLUSTER=c IMAGE=i TPU_TYPE=v5litepod-16 launch/gke_xpk.sh NAME CONFIG WORKDIR
set -euo pipefail
name=${1:?usage: gke_xpk.sh NAME CONFIG WORKDIR [overrides]}
config=${2:?usage: gke_xpk.sh NAME CONFIG WORKDIR [overrides]}
workdir=${3:?usage: gke_xpk.sh NAME CONFIG WORKDIR [overrides]}
shift 3
printf -v overrides ' %q' "$@"
[ $# -gt 0 ] || overrides=""
exec xpk workload create --workload="$name" --cluster="${CLUSTER:?set CLUSTER}" \
  --tpu-type="${TPU_TYPE:?set TPU_TYPE}" --docker-image="${IMAGE:?set IMAGE}" \
  --command="robust-mm train --config=$config --workdir=$workdir --distributed$overrides"
