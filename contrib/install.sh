#!/bin/sh
# Install localaid as a systemd service, bring an installation up to date, or take it away.  As often as you like.
set -eu

usage() {
    cat <<'END'
Usage: install.sh [OPTION]...
Install localaid into a virtual environment, with its units, user, folders, man page and completions, and start it.
Run again, it upgrades.  Models, configs and settings are never touched.

      --from WHAT         what pip installs: a folder, a wheel, or a requirement such as "localaid==1.2"
                          (default: the source tree that this script lies in, else "localaid")
      --wheel FILE        the same as --from FILE
      --pip-option OPTION an option for pip; repeatable.  Offline: --pip-option=--no-index
                          --pip-option=--find-links=FOLDER_OF_WHEELS
      --python PYTHON     the Python, 3.11 or newer, that the virtual environment is made from (default: python3)
      --prefix FOLDER     where the virtual environment is (default: /opt/localaid)
      --destdir FOLDER    lay everything out below FOLDER and start nothing, for a package or an image
      --socket            let systemd listen: enable localaid.socket and localaid-control.socket
      --no-start          enable and start nothing
      --uninstall         take all of it away, but for models, configs, settings and the user that owns them
  -h, --help              show this
END
}

say() { printf '%s\n' "install.sh: $*"; }
die() {
    printf '%s\n' "install.sh: $*" >&2
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
from='' python=python3 prefix=/opt/localaid destdir='' socket=no start=yes uninstall=no pip_options=''
while [ $# -gt 0 ]; do
    case $1 in
        --from=* | --wheel=* | --pip-option=* | --python=* | --prefix=* | --destdir=*)
            option=${1%%=*} value=${1#*=}
            shift
            set -- "$option" "$value" "$@"
            ;;
    esac
    case $1 in
        --from | --wheel | --pip-option | --python | --prefix | --destdir)
            [ $# -ge 2 ] || die "$1 needs a value; see --help"
            case $1 in
                --from | --wheel) from=$2 ;;
                --pip-option) pip_options="$pip_options
$2" ;;
                --python) python=$2 ;;
                --prefix) prefix=${2%/} ;;
                --destdir) destdir=${2%/} ;;
            esac
            shift
            ;;
        --socket) socket=yes ;;
        --no-start) start=no ;;
        --uninstall) uninstall=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die "unknown option $1; see --help" ;;
    esac
    shift
done
case $prefix in
    /?*) ;;
    *) die "--prefix must be an absolute path, not $prefix" ;;
esac
[ -n "$destdir" ] || [ "$(id -u)" = 0 ] || die "must be run as root: sudo $0"
[ -z "$destdir" ] || start=no

lib=$destdir/usr/local/lib
share=$destdir/usr/local/share
# installed file, from the wheel's share/ to its place on the machine
files="localaid/systemd/localaid.service $lib/systemd/system/localaid.service
localaid/systemd/localaid.socket $lib/systemd/system/localaid.socket
localaid/systemd/localaid-control.socket $lib/systemd/system/localaid-control.socket
localaid/sysusers.d/localaid.conf $lib/sysusers.d/localaid.conf
localaid/tmpfiles.d/localaid.conf $lib/tmpfiles.d/localaid.conf
man/man1/localaid.1 $share/man/man1/localaid.1
bash-completion/completions/localaid $share/bash-completion/completions/localaid
zsh/site-functions/_localaid $share/zsh/site-functions/_localaid
fish/vendor_completions.d/localaid.fish $share/fish/vendor_completions.d/localaid.fish"
# systemd runs here, and it is this machine that is installed to
runs_systemd() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }

if [ "$uninstall" = yes ]; then
    if runs_systemd; then
        for unit in localaid.socket localaid-control.socket localaid.service; do
            systemctl disable --quiet --now "$unit" 2>/dev/null || :
        done
    fi
    printf '%s\n' "$files" | while read -r _ place; do rm -f "$place"; done
    [ ! -L "$destdir/usr/local/bin/localaid" ] || rm -f "$destdir/usr/local/bin/localaid"
    [ ! -f "$destdir$prefix/pyvenv.cfg" ] || rm -rf "$destdir$prefix"
    rm -rf "$destdir/var/cache/localaid" "$destdir/run/localaid"
    if runs_systemd; then
        systemctl daemon-reload
        systemctl reset-failed localaid.service 2>/dev/null || :
    fi
    say "localaid is gone; its models in $destdir/var/lib/localaid, $destdir/etc/localaid and the user localaid stay"
    exit 0
fi

# -- the program --

if [ -z "$from" ]; then
    from=localaid
    [ ! -f "$here/../pyproject.toml" ] || from=$(cd "$here/.." && pwd)
fi
[ ! -e "$from" ] || from=$(cd "$(dirname "$from")" && pwd)/$(basename "$from")
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "$python is not Python 3.11 or newer; name one with --python"
venv=$destdir$prefix
[ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] || die "$venv is there and no virtual environment; see --prefix"
say "installing $from into $venv"
# What has not changed is not made again.
base='import sys; print(sys.base_prefix, sys.version)'
[ "$("$venv/bin/python" -c "import pip; $base" 2>/dev/null)" = "$("$python" -c "$base")" ] ||
    "$python" -m venv "$venv" || die "cannot make a virtual environment; on Debian: apt install python3-venv"
# One option a line: they may have spaces in them.
set -f
IFS='
'
# shellcheck disable=SC2086 # split at line breaks
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --upgrade $pip_options -- "$from"
unset IFS
set +f
# Of a version that has not changed pip leaves the files alone; those of a source tree may have.
if [ -e "$from" ]; then
    # shellcheck disable=SC2086 # as above
    (
        set -f
        IFS='
'
        "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --force-reinstall --no-deps $pip_options \
            -- "$from"
    )
fi
if [ -n "$destdir" ]; then # scripts of the environment say where it is
    find "$venv/bin" -type f -exec grep -lIF "$venv" {} + | while read -r script; do
        sed -i "s|$venv|$prefix|g" "$script"
    done
    sed -i "s|$venv|$prefix|g" "$venv/pyvenv.cfg"
fi

# -- what belongs to the machine --

printf '%s\n' "$files" | while read -r part place; do
    install -d "$(dirname "$place")"
    case $part in
        *.service) sed "s|/opt/localaid/|$prefix/|" "$venv/share/$part" >"$place.new" ;;
        *) cp "$venv/share/$part" "$place.new" ;;
    esac
    chmod 644 "$place.new"
    mv -f "$place.new" "$place"
done
install -d "$destdir/usr/local/bin"
ln -sfn "$prefix/bin/localaid" "$destdir/usr/local/bin/localaid"
install -d "$destdir/etc/localaid"
if [ ! -e "$destdir/etc/localaid/localaid.yaml" ]; then
    install -m 644 "$venv/share/localaid/localaid.yaml" "$destdir/etc/localaid/localaid.yaml"
fi
if [ -z "$destdir" ]; then
    systemd-sysusers "$lib/sysusers.d/localaid.conf"
    systemd-tmpfiles --create "$lib/tmpfiles.d/localaid.conf"
fi
runs_systemd && systemctl daemon-reload

# -- start --

if [ "$start" = no ] || ! runs_systemd; then
    say "done; start it with: systemctl enable --now localaid"
    exit 0
fi
if [ "$socket" = yes ]; then
    systemctl is-active --quiet localaid.socket || systemctl stop localaid.service # it listens there itself
    systemctl enable --quiet --now localaid.socket localaid-control.socket
fi
systemctl enable --quiet localaid.service
systemctl restart localaid.service # waits until it answers
say "localaid runs: $(systemctl show --value -p StatusText localaid.service)"
say "drop models into /var/lib/localaid/models, configs into /etc/localaid/configs"
say "let somebody else do so without sudo: usermod -aG localaid NAME"
