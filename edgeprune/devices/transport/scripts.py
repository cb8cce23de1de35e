"""What runs in the shell of a machine: POSIX sh that runs a command, takes or gives a file, or keeps a folder.

Each is started as `sh -c SCRIPT NAME TOKEN ...`. The token stands before what a command prints, so that the greetings
of a login shell are told from it, and behind what it says on stderr, with its status: where that is missing, the
connection was lost, whatever the status of ssh or adb.
"""

from __future__ import annotations

# $2: how many bytes of input the command has; then the command. Our own input stays open beyond them: when it ends,
# nobody waits any more, and the command is killed with all that it started (setsid makes it the head of a group).
# Status 999: there is no room for the input.
RUN = r"""
token=$1 size=$2
shift 2
leave() { printf '\n%s %s\n' "$token" "$1" >&2; exit 0; }
base=${TMPDIR:-/tmp}
[ -w "$base" ] || base=/data/local/tmp
exec 3<&0
if [ "$size" -gt 0 ]; then
    input=$(mktemp "$base/edgeprune-XXXXXX") || { printf '\n%s\n' "$token"; leave 999; }
    head -c "$size" <&3 >"$input"
    got=$(wc -c <"$input")
    exec 4<"$input"
    rm -f "$input"
    [ "$got" -eq "$size" ] || { printf '\n%s\n' "$token"; leave 999; }
else
    exec 4</dev/null
fi
printf '\n%s\n' "$token"
start() {
    if command -v setsid >/dev/null 2>&1; then exec setsid "$@"; fi
    exec "$@"
}
start "$@" <&4 3<&- 4<&- &
pid=$!
(
    cat <&3 >/dev/null
    kill -9 "-$pid" || kill -9 "$pid"
) >/dev/null 2>&1 4<&- &
watch=$!
wait "$pid"
status=$?
kill "$watch" 2>/dev/null
leave "$status"
"""
# A command that stays open and reads our own input: it ends by itself when that does.
TALK = r"""
token=$1
shift
printf '\n%s\n' "$token"
"$@"
printf '\n%s %s\n' "$token" "$?" >&2
exit 0
"""
# $2: bytes; $3: path. Under another name until it is whole.
PUT = r"""
token=$1 size=$2 path=$3
printf '\n%s\n' "$token"
head -c "$size" >"$path.part" && [ "$(wc -c <"$path.part")" -eq "$size" ] && mv -f "$path.part" "$path"
status=$?
[ "$status" -eq 0 ] || rm -f "$path.part"
printf '\n%s %s\n' "$token" "$status" >&2
exit 0
"""
# $3: path.
GET = r"""
token=$1 path=$3
printf '\n%s\n' "$token"
cat <"$path"
printf '\n%s %s\n' "$token" "$?" >&2
exit 0
"""
# $2: who wants to be alone on the machine, "" for nobody. Says "TOKEN folder PATH", "TOKEN held WHO" or
# "TOKEN failed WHY", reads a line now and then as a sign of life, and tidies up when there are no more.
# The lock is a symbolic link to the keeper's note, since one is made in one step, whole or not at all. A note is
# stale when its keeper runs no more, has not heard of us for 90 s (a cut cable is not noticed there), or comes from
# before a restart; stale folders and locks of the same user are removed. The link is read with readlink and never
# followed, which the kernel forbids in shared folders when it is somebody else's.
KEEP = r"""
token=$1 who=$2
umask 022
base=${TMPDIR:-/tmp}
[ -w "$base" ] || base=/data/local/tmp
lock=$base/edgeprune.lock
say() { printf '%s %s\n' "$token" "$1"; }
clock() { { IFS=. read -r now _ </proc/uptime; } 2>/dev/null || now=$(date +%s); }
note() { clock; printf '%s %s\n%s\n' "$$" "$now" "$who" >"$folder/.keeper"; }
stale() {
    [ -f "$1" ] || return 0
    { read -r pid beat <"$1"; } 2>/dev/null || { sleep 1; { read -r pid beat <"$1"; } 2>/dev/null || return 0; }
    case $pid$beat in *[!0-9]* | '') return 0 ;; esac
    clock
    [ "$now" -ge "$beat" ] && [ "$((now - beat))" -le 90 ] || return 0
    if [ -r "/proc/$$/cmdline" ]; then ! grep -q edgeprune-keeper "/proc/$pid/cmdline" 2>/dev/null
    else ! kill -0 "$pid" 2>/dev/null; fi
}
tidy() {
    trap '' HUP INT TERM
    [ "$(readlink "$lock" 2>/dev/null)" != "$mine" ] || rm -f "$lock"
    rm -rf "$folder" 2>/dev/null || { sleep 1; rm -rf "$folder"; }
    exit 0
}
for old in "$base"/edgeprune-??????; do
    [ -f "$old/.keeper" ] && [ -O "$old" ] && stale "$old/.keeper" && rm -rf "$old"
done 2>/dev/null
folder=$(mktemp -d "$base/edgeprune-XXXXXX" 2>&1) || { say "failed $folder"; exit 0; }
mine=${folder##*/}/.keeper
trap tidy HUP INT TERM
note || { say "failed nothing can be written to $folder"; tidy; }
if [ -n "$who" ]; then
    chmod 755 "$folder"
    tries=0
    until ln -s "$mine" "$lock" 2>/dev/null; do
        held=$(readlink "$lock")
        tries=$((tries + 1))
        if [ -n "$held" ] && ! stale "$base/$held"; then
            { read -r pid _ && read -r by; } <"$base/$held"
            say "held ${by:-somebody}"
            tidy
        fi
        if [ "$tries" -gt 5 ]; then
            say "held nobody any more, but $lock can't be removed: remove it"
            tidy
        fi
        # Where it is gone meanwhile, somebody else was quicker: look again.
        mv "$lock" "$folder/old" 2>/dev/null || continue
        # Somebody else may have been quicker, and this is his new one.
        [ "$(readlink "$folder/old")" = "$held" ] || mv "$folder/old" "$lock"
        rm -f "$folder/old"
    done
fi
cd /
say "folder $folder"
while read -r _; do note; done
tidy
"""
