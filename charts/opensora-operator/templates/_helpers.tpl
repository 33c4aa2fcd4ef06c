{{/* Name of the Deployment, the service account and everything that belongs to the release alone. */}}
{{- define "opensora-operator.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 48 | trimSuffix "-" }}
{{- end }}

{{/* What lies outside namespaces carries the namespace in its name, so that two releases do not meet. */}}
{{- define "opensora-operator.clusterName" -}}
{{ .Release.Namespace }}:{{ include "opensora-operator.fullname" . }}
{{- end }}

{{- define "opensora-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "opensora-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "opensora-operator.selectorLabels" -}}
app.kubernetes.io/name: opensora-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "opensora-operator.labels" -}}
app.kubernetes.io/name: opensora-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: opensora
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "opensora-operator.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end }}
{{- end }}

{{/* Of the pods of the Deployment and of the hooks: who they are and where they may run. */}}
{{- define "opensora-operator.podSettings" -}}
# Kubernetes' variables for Services begin like the operator's own.
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  # The root file system is read-only.
  - {name: tmp, emptyDir: {sizeLimit: 64Mi}}
  {{- with .Values.extraVolumes }}{{- toYaml . | nindent 2 }}{{- end }}
{{- end }}

{{- define "opensora-operator.containerSettings" -}}
image: {{ include "opensora-operator.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- with .Values.extraVolumeMounts }}{{- toYaml . | nindent 2 }}{{- end }}
{{- end }}

{{/* The operator's settings as flags; `opensora-operator --help` explains them. */}}
{{- define "opensora-operator.arguments" -}}
- --lease-name={{ include "opensora-operator.fullname" . }}
- --lease-seconds={{ .Values.leaderElection.leaseSeconds }}
- --renew-seconds={{ .Values.leaderElection.renewSeconds }}
- --retry-seconds={{ .Values.leaderElection.retrySeconds }}
{{- with .Values.watchNamespaces }}
- --namespaces={{ join "," . }}
{{- end }}
- --concurrency={{ .Values.reconcile.concurrency }}
- --resync-seconds={{ .Values.reconcile.resyncSeconds }}
- --requests-per-second={{ .Values.reconcile.clientQPS }}
- --requests-burst={{ .Values.reconcile.clientBurst }}
- --progress-writes-per-second={{ .Values.progress.writesPerSecond }}
{{- if .Values.progress.enabled }}
- --progress-service={{ include "opensora-operator.fullname" . }}-progress
- --progress-port={{ .Values.progress.port }}
{{- end }}
- --http-port={{ .Values.metrics.port }}
- --log-level={{ .Values.logging.level }}
- --log-format={{ .Values.logging.format }}
{{- end }}

{{- define "opensora-operator.subjects" -}}
- kind: ServiceAccount
  name: {{ include "opensora-operator.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{/* Made after the release, in the order of the weight, and gone again once all of it has worked. */}}
{{- define "opensora-operator.installHook" -}}
helm.sh/hook: post-install,post-upgrade,post-rollback
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- define "opensora-operator.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
