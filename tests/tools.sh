#!/bin/sh
# Debian's packages that tests use where they are there: tools.sh chromium prometheus. Never fails: without them those tests
# are skipped, and say why.
missing=
for package in "$@"; do
  command -v "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "no$missing here: their tests will be skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# The package starts a server of its own where there is systemd; a policy of 101 keeps it from that.
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
install() { timeout 300 apt-get install -y -qq --no-install-recommends $missing; }
if ! { install || { timeout 120 apt-get update -qq && install; }; } >"$log" 2>&1; then
  echo "could not install$missing: their tests will be skipped" >&2
  tail -3 "$log" >&2
fi
rm -f "$log"
