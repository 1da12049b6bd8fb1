#!/usr/bin/env bash
# deploy/to_the_end.sh WORKDIR COMMAND...
#
# Runs COMMAND (train.py and its flags) and tells a scheduler whether the run is complete. train.py ends
# with success when SIGTERM made it save and stop early; a scheduler that believed this would never start it
# again. So: success only if the checkpoint of the last step (config.train.steps) is there, else 75, "try
# again". Errors of COMMAND pass through. SIGTERM is handed on to it.
set -u
workdir=$1
shift

child=
stopped=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
[ -z "$stopped" ] || kill -TERM "$child"
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
  wait "$child"
  code=$?
done
((code == 0)) || exit "$code"

steps=$(sed -n '/"train": {/,/}/s/.*"steps": \([0-9]*\).*/\1/p' "$workdir/config.json") || exit 75
[ -n "$steps" ] && [ -e "$workdir/checkpoints/$steps" ] || exit 75
