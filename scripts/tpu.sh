#!/usr/bin/env bash
# Runs one command of this project on every host of a TPU VM, pod or multislice; see docs/tpu.md.
#
#   scripts/tpu.sh setup                        installs or updates the project on all hosts
#   scripts/tpu.sh run train.py configs/neo_ov_9b_sft.py --pod v5e-256 start=... workdir=gs://...
#   scripts/tpu.sh run infer.py eval --pod --model ... --bench ... --data ... --out ...
#   scripts/tpu.sh log [LINES]                  the last lines of host 0's log
#   scripts/tpu.sh stop                         SIGTERM; training first saves its step
#
# Needs TPU_NAME and ZONE, and for setup SOURCE, a git URL of this project. With SLICES=n, TPU_NAME is
# the prefix of the n slices' names. LIBTPU_INIT_ARGS and JAX_COMPILATION_CACHE_DIR are passed on.
set -euo pipefail

: "${TPU_NAME:?name of the TPU, or with SLICES the prefix of its slices names}" "${ZONE:?its zone}"
readonly FOLDER=neo_jax

names() {
  if [[ -n ${SLICES:-} ]]; then seq -f "${TPU_NAME}-%.0f" 0 $((SLICES - 1)); else echo "$TPU_NAME"; fi
}

everywhere() { # COMMAND: runs it on all hosts of all slices at once
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
    # The Python of the VM images may be too old; uv installs another.
    everywhere "set -e
      if test -d $FOLDER; then git -C $FOLDER pull --quiet --ff-only; else git clone '$SOURCE' $FOLDER; fi
      cd $FOLDER
      python3 -m pip install --quiet --user uv
      test -d .venv || python3 -m uv venv --quiet --python '>=3.11,<3.14' .venv
      python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'"
    ;;
  run)
    shift
    # The program survives the end of the connection; each host keeps its process id and its log.
    # Only the last command of the list runs in the background, so $! is the program's own id.
    everywhere "cd $FOLDER || exit 1
      nohup env LIBTPU_INIT_ARGS='${LIBTPU_INIT_ARGS:-}' \
        JAX_COMPILATION_CACHE_DIR='${JAX_COMPILATION_CACHE_DIR:-}' \
        .venv/bin/python $(printf '%q ' "$@") > run.log 2>&1 < /dev/null &
      echo \$! > run.pid"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$(names | head -1)" --zone="$ZONE" --worker=0 \
      --command="tail -n ${2:-40} $FOLDER/run.log"
    ;;
  stop)
    everywhere "kill -TERM \$(cat $FOLDER/run.pid)"
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
