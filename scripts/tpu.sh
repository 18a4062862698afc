#!/usr/bin/env bash
# Runs one command of this project on every host of a TPU VM, pod or multislice; see docs/tpu.md.
#
#   scripts/tpu.sh setup                        installs the project on all hosts
#   scripts/tpu.sh run configs/neo_ov_9b_sft.py --pod v5e-256 start=... workdir=gs://... ...
#   scripts/tpu.sh log [LINES]                  the last lines of host 0
#   scripts/tpu.sh stop                         SIGTERM: all hosts save their step and end
#
# Needs TPU_NAME and ZONE, and SOURCE, what pip installs (a git URL or a gs:// wheel), for setup. With
# SLICES=n, TPU_NAME is the prefix of the n slices' names.
set -euo pipefail

: "${TPU_NAME:?name of the TPU, or with SLICES the prefix of its slices names}" "${ZONE:?its zone}"
readonly FOLDER=neo_jax
# The compiler's flags for each chip: python -c "from neo_jax.plan.chips import CHIPS; print(CHIPS['v5e'].libtpu_args)"
readonly FLAGS=${LIBTPU_INIT_ARGS:-}

names() {
  if [[ -n ${SLICES:-} ]]; then seq -f "${TPU_NAME}-%.0f" 0 $((SLICES - 1)); else echo "$TPU_NAME"; fi
}

everywhere() { # COMMAND: on all hosts of all slices at once
  local name pids=() failed=0
  for name in $(names); do
    gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

case ${1:-} in
  setup)
    : "${SOURCE:?a git URL of this project}"
    everywhere "test -d $FOLDER || git clone '$SOURCE' $FOLDER
      cd $FOLDER && python3 -m venv .venv && .venv/bin/pip install --quiet --upgrade pip &&
      .venv/bin/pip install --quiet --editable '.[tpu]'"
    ;;
  run)
    shift
    # The run goes on when the connection ends; each host keeps its process id and its log.
    everywhere "cd $FOLDER && nohup env LIBTPU_INIT_ARGS='$FLAGS' \
      JAX_COMPILATION_CACHE_DIR='${JAX_COMPILATION_CACHE_DIR:-}' \
      .venv/bin/python train.py $(printf '%q ' "$@") > run.log 2>&1 < /dev/null & echo \$! > $FOLDER/run.pid"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$(names | head -1)" --zone="$ZONE" --worker=0 \
      --command="tail -n ${2:-40} $FOLDER/run.log"
    ;;
  stop)
    everywhere "kill -TERM \$(cat $FOLDER/run.pid)"
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
