{{/* Values that contradict each other, one sentence each. */}}
{{- define "rebalancer.check" -}}
{{- $ours := dict "shim" "shim" "mode" "mode" "dry-run" "mode" "source" "source" "intercept" "relay.intercept" "metrics" "agent.metrics" "lease-namespace" "the release's namespace" -}}
{{- range $name, $value := .Values.agent.settings -}}
{{- with get $ours $name -}}{{- fail (printf "agent.settings.%s: the chart has a value of its own for it: set %s" $name .) -}}{{- end -}}
{{- if or (eq $name "peer") (hasPrefix "peer-c" $name) (eq $name "peer-key") (eq $name "peers") -}}
{{- fail (printf "agent.settings.%s: all pods of a DaemonSet have the same flags: leave it out, and they find each other by Leases" $name) -}}
{{- end -}}
{{- if and (eq $name "cgroup-root") (not (regexMatch "^/sys/fs/cgroup(/|$)" (toString $value))) -}}{{- fail (printf "agent.settings.cgroup-root: %s: a pod has the host's cgroups at /sys/fs/cgroup: leave it out" (toString $value)) -}}{{- end -}}
{{- if eq $name "config" -}}{{- fail "agent.settings.config: what that file names would not be in the pod: give its keys as settings" -}}{{- end -}}
{{- end -}}
{{- if hasKey .Values.relay.settings "metrics" -}}{{- fail "relay.settings.metrics: the chart has a value of its own for it: set relay.metrics" -}}{{- end -}}
{{- if eq .Release.Namespace "kube-system" -}}
{{- fail "the namespace is kube-system: the agents' right to write Leases would hold for those of others: install it in one of its own" -}}
{{- end -}}
{{- $loopback := "^(127\\.|\\[::1\\])" -}}
{{- if and (eq .Values.shim "relay") (not .Values.relay.intercept) .Values.relay.inPod (regexMatch $loopback (toString (get .Values.relay.settings "listen"))) -}}
{{- fail (printf "relay.intercept is false and relay.settings.listen is %s: no client would reach the relay: give it an address that clients reach" (toString (get .Values.relay.settings "listen"))) -}}
{{- end -}}
{{- if .Values.podMonitor.enabled -}}
{{- if regexMatch $loopback .Values.agent.metrics -}}
{{- fail (printf "podMonitor.enabled is true and agent.metrics is %s, which Prometheus does not reach: give it 0.0.0.0:9470 or [::]:9470" .Values.agent.metrics) -}}
{{- end -}}
{{- if and (include "rebalancer.hasRelay" .) (regexMatch $loopback .Values.relay.metrics) -}}
{{- fail (printf "podMonitor.enabled is true and relay.metrics is %s, which Prometheus does not reach: give it 0.0.0.0:9471 or [::]:9471" .Values.relay.metrics) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.shim "none") (ne .Values.mode "dry-run") -}}
{{- fail (printf "mode is %s and shim is none: there is nothing that could say GOAWAY: set shim, or mode to dry-run" .Values.mode) -}}
{{- end -}}
{{- $control := toString (get .Values.relay.settings "control" | default "unix:/run/rebalancer/relay.sock") -}}
{{- if and (include "rebalancer.hasRelay" .) (ne $control "unix:/run/rebalancer/relay.sock") -}}
{{- fail (printf "relay.settings.control is %s, and the agent asks unix:/run/rebalancer/relay.sock: leave it out" $control) -}}
{{- end -}}
{{- $ports := dict -}}
{{- $addresses := dict "agent.settings.peer-listen" (toString (get .Values.agent.settings "peer-listen" | default "[::]:9443")) "agent.metrics" .Values.agent.metrics -}}
{{- with get .Values.agent.settings "lb-agent" -}}{{- $_ := set $addresses "agent.settings.lb-agent" (toString .) -}}{{- end -}}
{{- if include "rebalancer.hasRelay" . -}}
{{- $_ := set $addresses "relay.settings.listen" (toString (get .Values.relay.settings "listen" | default "[::]:6443")) -}}
{{- end -}}
{{- range $name, $address := $addresses -}}
{{- $port := regexFind "[0-9]+$" $address -}}
{{- with get $ports $port -}}{{- fail (printf "%s and %s are both port %s of the host: give them two ports" . $name $port) -}}{{- end -}}
{{- $_ := set $ports $port $name -}}
{{- end -}}
{{- if and (include "rebalancer.hasRelay" .) (eq (regexFind "[0-9]+$" .Values.agent.metrics) (regexFind "[0-9]+$" .Values.relay.metrics)) -}}
{{- fail (printf "agent.metrics is %s and relay.metrics is %s: both are in the host's network: give them two ports" .Values.agent.metrics .Values.relay.metrics) -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.podMonitor.enabled (not .Values.networkPolicy.metricsCIDRs) -}}
{{- fail "networkPolicy.enabled and podMonitor.enabled are true and networkPolicy.metricsCIDRs is empty: Prometheus would be kept out: name its networks" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.peerCIDRs) -}}
{{- fail "networkPolicy.enabled is true and networkPolicy.peerCIDRs is empty: agents would not reach each other: name the control-plane nodes' networks" -}}
{{- end -}}
{{- end -}}

{{/* "yes" where a relay is in the pod. */}}
{{- define "rebalancer.hasRelay" -}}
{{- if and (eq .Values.shim "relay") .Values.relay.inPod }}yes{{ end -}}
{{- end -}}

{{- define "rebalancer.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Settings as words of a command line, a YAML list; a number of JSON loses no digit. */}}
{{- define "rebalancer.words" -}}
{{- range $name, $value := . }}
{{- if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "--%s=%s" $name . | quote }}
{{- end }}
{{- else if not (kindIs "invalid" $value) }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Directories of the files that settings name, as JSON: path -> whether it is written. A test holds the two lists to what
agent and relay say of their flags. */}}
{{- define "rebalancer.mounts" -}}
{{- $read := list "kubeconfig" "peer-cert" "peer-key" "peer-ca" "upstream-ca" "tls-cert" "tls-key" "tls-sni-cert-key" "client-ca" "requestheader-client-ca-file" "proxy-client-cert" "proxy-client-key" -}}
{{- $made := list "state" "decision-log" "api" "control" -}}
{{- $mounts := dict "/run/rebalancer" true -}}
{{- range $name, $value := . -}}
{{- $values := kindIs "slice" $value | ternary $value (list $value) -}}
{{- range $values -}}
{{- if and (kindIs "string" .) (or (has $name $read) (has $name $made)) -}}
{{- $files := list . -}}
{{- if eq $name "tls-sni-cert-key" -}}{{- $files = splitList "," (first (splitList ":" .)) -}}{{- end -}}
{{- range $files -}}
{{- $file := trimPrefix "unix:" . -}}
{{- $directory := dir $file -}}
{{- if or (not (hasPrefix "/" $file)) (eq $directory "/") (contains "/../" $file) -}}
{{- fail (printf "settings.%s: %s: a pod needs an absolute path, of a file in a directory of its own" $name $file) -}}
{{- end -}}
{{- $_ := set $mounts $directory (or (has $name $made) (get $mounts $directory | default false)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $mounts -}}
{{- end -}}

{{- define "rebalancer.volumeName" -}}
{{- $name := regexReplaceAll "[^a-z0-9]" (lower .) "-" | trimAll "-" -}}
{{- if and (le (len $name) 63) (regexMatch "^[a-z0-9/]*$" .) -}}
{{- $name -}}
{{- else -}}
{{- printf "%s-%s" (trunc -56 $name | trimAll "-") (sha256sum . | trunc 6) -}}
{{- end -}}
{{- end -}}

{{- define "rebalancer.probe" -}}
{{- $host := regexReplaceAll ":[0-9]+$" .address "" | trimAll "[]" -}}
httpGet: {host: {{ get (dict "0.0.0.0" "127.0.0.1" "::" "::1") $host | default $host | quote }}, port: {{ regexFind "[0-9]+$" .address }}, path: {{ .path }}}
periodSeconds: 10
timeoutSeconds: 5
{{- end -}}

{{- define "rebalancer.confined" -}}
securityContext:
  # A user of its own would get no capabilities: Kubernetes sets no ambient ones.
  runAsUser: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}
