#!/usr/bin/env bash
# tests.sh FOLDER [cpu]: on a machine with a GPU, the tests that need one, and a run that is killed and goes on; about two
# minutes. Leaves logs in FOLDER and ends with a table. With `cpu` the same words without a GPU, in miniature.
set -uo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ -d "$home/.venv/bin" ] && PATH="$home/.venv/bin:$PATH"
mkdir -p "${1:?usage: tests.sh FOLDER [cpu]}"
folder=$(cd "$1" && pwd) device=${2:-cuda}
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
cd "$home" || exit 1

tests=(tests/privacy/test_gpu.py tests/privacy/test_sensitivity.py tests/privacy/test_batching.py)
[ "$device" = cpu ] && tests=(tests/privacy/test_gpu.py tests/privacy/test_batching.py)
timeout 100 python -m pytest -q -rs -p no:cacheprovider "${tests[@]}" >"$folder/tests.log" 2>&1
passed="status $?, $(tail -n 1 "$folder/tests.log")"

# A run in a session of its own, all of whose processes are killed in the middle of its private steps.
words=(tests/tiny.yaml "run.dir=$folder/run" "runtime.device=$device" finetune.steps=40 finetune.checkpoint_every=1)
setsid python -m privimage run "${words[@]}" >"$folder/killed.log" 2>&1 &
run=$!
for _ in $(seq 600); do
    [ -e "$folder/run/finetune/checkpoint.pt" ] && break
    kill -0 "$run" 2>/dev/null || break
    sleep 0.1
done
kill -9 -- "-$run" 2>/dev/null && killed=yes || killed=no
wait "$run" 2>/dev/null
[ -e "$folder/run/finetune/weights.pt" ] && killed="no, it was done"
timeout 300 python -m privimage run "${words[@]}" >"$folder/resumed.log" 2>&1
resumed=$?
released=$([ -e "$folder/run/release/PRIVACY.json" ] && echo yes || echo no)
rm -rf "$folder/run/private" "$folder/ledgers"

printf '%-28s %s\n' device "$device" tests "$passed" "killed while fine-tuning" "$killed" \
    "status when started again" "$resumed" released "$released" | tee "$folder/table.txt"
grep -q 'no ' <<<"$killed $released" && exit 1
exit "$resumed"
