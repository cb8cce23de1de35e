"""A machine behind the system's ssh: keys, jumps and aliases are those of the user's ssh configuration."""

from __future__ import annotations

import os
import re
import shlex
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple
from urllib.parse import parse_qsl

from edgeprune import agent
from edgeprune.devices._base import ShellDevice, redacted
from edgeprune.devices.transport.shell import Shell
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, UsageError

# BatchMode: a question for a password would wait for ever. ServerAlive: a cut cable is noticed after 30 s.
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "LogLevel=ERROR",
)
_KEEP_CONNECTION_S = 20
# The socket of a shared connection may have a path of so many characters on every system, with what ssh adds to it.
_MOST_PATH = 90
_ADDRESS = re.compile(
    r"""
    (?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+-]*)@)?
    (?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*))
    (?::(?P<port>[0-9]{1,5}))?
    /?
    (?:\?(?P<query>[^\s#]*))?
    """,
    re.VERBOSE,
)
_FORM = "ssh://[user@]host[:port][?python=PATH]"
# What ssh says -> what is wrong, and what to do; {host} is put in. The first that fits.
_FAULTS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "it has another host key than before",
        "if it was set up anew, forget the old key: {forget}; if not, somebody else may be answering",
    ),
    (
        "Host key verification failed",
        "its host key is not known here",
        "connect once by hand, and compare its fingerprint: ssh {host}",
    ),
    ("Permission denied", "it lets nobody in with our keys", "give it your key: ssh-copy-id {host}"),
    (
        "Too many authentication failures",
        "it was offered too many keys",
        "name one for it in ~/.ssh/config (IdentityFile)",
    ),
    (
        "Could not resolve hostname",
        "no machine has this name",
        "look for it in ~/.ssh/config, /etc/hosts or the DNS",
    ),
    ("Connection refused", "nothing listens on its port", "start its ssh server: sudo systemctl start ssh"),
    ("timed out", "it does not answer", "see that it is on and in the network: ssh {host} true"),
    ("No route to host", "it does not answer", "see that it is on and in the network: ssh {host} true"),
    ("Network is unreachable", "there is no way to its network", "see that this machine is in the network"),
    ("Connection closed by", "it closed the connection", "ask it why: ssh -v {host} true"),
    (
        "No such file or directory: 'ssh'",
        "there is no ssh on this machine",
        "sudo apt install openssh-client",
    ),
)


@dataclass(frozen=True)
class Ssh(ShellDevice):
    """A far machine; `address` is what stands behind ssh:// in its URL."""

    address: str = "localhost"

    def __post_init__(self) -> None:
        _parts(self.address)

    @property
    def name(self) -> str:
        """As Device.name: "ssh://user@host:port", as far as they are said."""
        parts = _parts(self.address)
        user = f"{parts['user']}@" if parts["user"] else ""
        port = f":{parts['port']}" if parts["port"] else ""
        return f"ssh://{user}{_host(self.address, brackets=True)}{port}"

    @property
    def line(self) -> Shell:
        """See `ShellDevice.line`."""
        return Shell(self.name, self._attached, self._explained)

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        """As Device.run."""
        return self.line.run(argv, stdin.encode(), timeout_s)

    def put(self, here: Path, there: str) -> None:
        """As Device.put; through the shell, so that a machine without an SFTP server will do."""
        self.line.put(here, there)

    def get(self, there: str, here: Path) -> None:
        """As Device.get."""
        self.line.get(there, here)

    def agent(self) -> List[str]:
        """As Device.agent: the machine's own Python, with what it has installed."""
        return [_python(_parts(self.address)["query"]), "-c", agent.START]

    def _attached(self, argv: Sequence[str]) -> List[str]:
        parts = _parts(self.address)
        options = [word for option in (*_OPTIONS, *_shared()) for word in ("-o", option)]
        user = ["-l", parts["user"]] if parts["user"] else []
        port = ["-p", parts["port"]] if parts["port"] else []
        # ssh hands one string to the login shell there; every word is quoted for it.
        command = " ".join(shlex.quote(word) for word in argv)
        return ["ssh", "-T", *options, *user, *port, "--", _host(self.address), f"exec {command}"]

    def _explained(self, said: str) -> Tuple[str, str]:
        parts, host = _parts(self.address), _host(self.address)
        by_hand = f"{parts['user']}@{host}" if parts["user"] else host
        by_hand = f"-p {parts['port']} {by_hand}" if parts["port"] else by_hand
        known = f"'[{host}]:{parts['port']}'" if parts["port"] not in (None, "22") else host
        forget = re.search(r"ssh-keygen -f .*-R .*", said)
        last = " | ".join(line.strip() for line in said.strip().splitlines()[-3:] if line.strip("@ \t"))
        for sign, what, fix in _FAULTS:
            if sign in said:
                return f"{what} ({last})", fix.format(
                    host=by_hand, forget=forget.group().strip() if forget else f"ssh-keygen -R {known}"
                )
        return last or "the connection ended without a word", f"try by hand: ssh {by_hand} true"


def _parts(address: str) -> Dict[str, Optional[str]]:
    """user, host or ipv6, port and query of an address; what is not said is None."""
    before = address.rpartition("@")[0]
    if ":" in before and not before.startswith("["):
        raise UsageError(
            f"device {redacted('ssh://' + address)!r} has a password in it, which would be kept in recipes and logs",
            "let it in with a key: ssh-copy-id user@host",
        )
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"] or 22) < 65536:
        raise UsageError(
            f"device {redacted('ssh://' + address)!r} is not an address; accepted: {_FORM}",
            "a name may have letters, digits, dots, - and _; an IPv6 address stands in brackets: ssh://[fe80::1%eth0]",
        )
    _python(match["query"])
    return match.groupdict()


def _python(query: Optional[str]) -> str:
    """The device's Python that an address names; python3 when it names none."""
    options = dict(parse_qsl(query or "", keep_blank_values=True))
    python = options.pop("python", "python3")
    bad = bool(query) and not dict(parse_qsl(query or "", keep_blank_values=True))
    if options or bad or not python or not python.isprintable() or python.startswith("-"):
        found = ", ".join(options) or repr(query or "")
        raise UsageError(
            f"a device's address has no option {found}; accepted: {_FORM}", "as ?python=/opt/venv/bin/python"
        )
    # The login's folder is the current one there, and the shell is given words that it does not change.
    return f".{python[1:]}" if python.startswith("~/") else python


def _host(address: str, *, brackets: bool = False) -> str:
    parts = _parts(address)
    if parts["ipv6"]:
        return f"[{parts['ipv6']}]" if brackets else parts["ipv6"]
    return parts["host"] or ""


def _shared() -> List[str]:
    """Options that let all commands use one connection, by a socket in a folder that is ours alone; else none."""
    folder = Path(tempfile.gettempdir()) / f"edgeprune-ssh-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return ["ControlPath=none"]
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not ours or len(str(folder)) + len("/") + 40 > _MOST_PATH:
        return ["ControlPath=none"]
    return [
        "ControlMaster=auto",
        f"ControlPath={_quoted(str(folder))}",
        f"ControlPersist={_KEEP_CONNECTION_S}",
    ]


def _quoted(folder: str) -> str:
    """The path of the socket as ssh's options read it: % starts a token, and words are split unless quoted."""
    if '"' in folder or "\n" in folder:
        raise DeviceError(
            f"the temporary folder {folder!r} can't be used with ssh", "set TMPDIR to another one"
        )
    return '"' + folder.replace("%", "%%") + '/%C"'
