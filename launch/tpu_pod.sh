#!/usr/bin/env bash
# The same command on every worker of a Cloud TPU pod slice; the work directory
# must be one that all workers see.
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh CONFIG WORKDIR [overrides]
set -euo pipefail
config=${1:?usage: tpu_pod.sh CONFIG WORKDIR [overrides]}
workdir=${2:?usage: tpu_pod.sh CONFIG WORKDIR [overrides]}
shift 2
printf -v overrides ' %q' "$@"
[ $# -gt 0 ] || overrides=""
exec gcloud compute tpus tpu-vm ssh "${TPU:?set TPU}" --zone="${ZONE:?set ZONE}" \
  --worker=all --command="robust-mm train --config=$config --workdir=$workdir --distributed$overrides"
