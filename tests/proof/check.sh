#!/bin/sh
# check.sh WANT MODEL [SWITCH...]: one run of a model with spin in a scratch folder; succeeds when its verdict is WANT
# (holds or counterexample). SWITCH: -D options that take rules away, named at the model's head.
# Environment: LIMIT seconds, MEMLIM MiB, DEPTH steps, PAN more options for the verifier (-DCOLLAPSE: half the memory, more time).
# Invalid end states are ignored (-E): each model judges its own end by a timeout assertion.
want=$1
model=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
shift 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2
spin -a "$@" "$model" >spin.out 2>&1 || { cat spin.out; exit 2; }
cc -O1 -DSAFETY -DVECTORSZ=2048 -DMEMLIM="${MEMLIM:-6000}" ${PAN:-} -o pan pan.c 2>cc.out || { cat cc.out; exit 2; }
timeout "${LIMIT:-600}" ./pan -E -m"${DEPTH:-200000}" >out 2>&1
why=$(grep -m1 '^pan:1:' out)
verdict=unfinished
if [ -n "$why" ]; then
  verdict=counterexample
elif grep -q 'errors: 0' out && ! grep -Eq 'Search not completed|max search depth too small|out of memory|memory limit' out; then
  verdict=holds
fi
echo "$(basename "$model") [$*] $verdict, $(grep 'states, stored' out | awk '{print $1}') states $why"
[ "$verdict" = "$want" ]
