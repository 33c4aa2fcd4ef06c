{{- /* Written by `python -m opensora_operator.packaging` from operator/opensora_operator/permissions.py. */ -}}
{{- define "opensora-operator.rules.own" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, create, update]
{{- end }}
{{- define "opensora-operator.rules.watched" -}}
- apiGroups: [opensora.dev]
  resources: [trainingruns, samplejobs, batchsearches]
  verbs: [get, list, watch, delete]
- apiGroups: [opensora.dev]
  resources: [trainingruns/status, samplejobs/status, batchsearches/status]
  verbs: [patch]
- apiGroups: [opensora.dev]
  resources: [trainingprofiles]
  verbs: [get, list, watch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: ['']
  resources: [pods]
  verbs: [list, watch, delete]
- apiGroups: ['']
  resources: [pods/status]
  verbs: [patch]
- apiGroups: ['']
  resources: [services, configmaps]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
{{- define "opensora-operator.rules.cluster" -}}
- apiGroups: [opensora.dev]
  resources: [clustertrainingprofiles]
  verbs: [get, list, watch]
- apiGroups: ['']
  resources: [nodes]
  verbs: [get]
{{- end }}
{{- define "opensora-operator.rules.view" -}}
- apiGroups: [opensora.dev]
  resources: [trainingruns, samplejobs, batchsearches, trainingprofiles]
  verbs: [get, list, watch]
- apiGroups: [opensora.dev]
  resources: [clustertrainingprofiles]
  verbs: [get, list, watch]
{{- end }}
{{- define "opensora-operator.rules.edit" -}}
- apiGroups: [opensora.dev]
  resources: [trainingruns, samplejobs, batchsearches, trainingprofiles]
  verbs: [create, update, patch, delete, deletecollection]
{{- end }}
