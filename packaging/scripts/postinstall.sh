#!/bin/sh
# Runs after the files of resultity-agent are in place, for deb ("configure
# [OLD]") and rpm (1 at first, 2 at upgrades) alike. Every step may be repeated.
set -eu

account=resultity

# The account, then its subordinate ids: sysusers makes none, and rootless
# Podman cannot work without them.
systemd-sysusers resultity.conf
if [ -z "$(getsubids "$account" 2>/dev/null)" ]; then
	(
		flock 9
		# The first 65536 ids above all that are given out, in both files.
		first=$(cat /etc/subuid /etc/subgid 2>/dev/null | awk -F: '
			BEGIN { next_free = 524288 }
			$2 + $3 > next_free { next_free = $2 + $3 }
			END { print next_free }')
		last=$((first + 65535))
		if [ "$last" -ge 4294967295 ]; then
			echo "resultity: no free range of subordinate ids in /etc/subuid; give $account one with usermod --add-subuids" >&2
			exit 1
		fi
		usermod --add-subuids "$first-$last" --add-subgids "$first-$last" "$account"
	) 9<>/etc/subuid
fi

systemd-tmpfiles --create resultity.conf
journalctl --update-catalog || :
systemctl --global preset resultity-agent.service || :
systemctl preset resultity-signer.socket || :

# The node's key, held by nobody but its signer. An agent that has one of its own
# keeps it until the operator moves it (resultity-signer migrate), and a machine on
# which nothing can be encrypted has the agent hold it.
signer=/usr/libexec/resultity/resultity-signer
if [ ! -e /var/lib/resultity/.local/state/resultity/agent/identity/key.json ]; then
	"$signer" init || rm -f /run/resultity-signer/socket
fi

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	if [ -e /etc/credstore.encrypted/resultity-key ]; then
		systemctl restart resultity-signer.socket || :
		systemctl try-restart resultity-signer.service || :
	fi
	loginctl enable-linger "$account"
	# Lingering starts the account's service manager, and waits for nothing.
	systemctl start "user@$(id -u "$account").service"
	# At an upgrade the running agent is replaced; the runtime keeps its model
	# loaded. At a first installation the operator starts the agent, once
	# /etc/resultity/agent.toml says which network.
	if systemctl --user -M "$account@" daemon-reload 2>/dev/null; then
		systemctl --user -M "$account@" try-restart resultity-agent.service || :
	fi
fi
