{{/* Labels that select the pods of this release. KubeRay uses app.kubernetes.io for itself. */}}
{{- define "milliways.selector" -}}
milliways/instance: {{ .root.Release.Name }}
milliways/role: {{ .role }}
{{- end }}

{{- define "milliways.labels" -}}
app.kubernetes.io/name: milliways
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* GPUs of one pod of workers; 0 on a cluster of CPUs. */}}
{{- define "milliways.gpus" -}}
{{ mul (int .Values.config.workers.gpus_each) (int .Values.workers.perPod) }}
{{- end }}

{{/* Pods that hold the workers with attention. */}}
{{- define "milliways.workerPods" -}}
{{ div (add (int .Values.config.workers.count) (mul -1 (int .Values.config.workers.experts_only)) (int .Values.workers.perPod) -1) (int .Values.workers.perPod) }}
{{- end }}

{{/* The application for Serve: deploy/serve.yaml with the settings of the values. */}}
{{- define "milliways.serveConfig" -}}
{{- $config := deepCopy .Values.config }}
{{- if .Values.tls.secretName }}
{{- $files := dict "ca_file" "/etc/milliways/tls/ca.crt" "cert_file" "/etc/milliways/tls/tls.crt" "key_file" "/etc/milliways/tls/tls.key" }}
{{- $config = set $config "tls" $files }}
{{- end -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.config.ingress.port }}
applications:
  - name: milliways
    route_prefix: /
    import_path: milliways.cluster.ray.app:app
    args:
      {{- toYaml $config | nindent 6 }}
    deployments:
      - name: Ingress
        # Each replica opens its gRPC port on its node.
        max_replicas_per_node: 1
        # So a new replica can start only when an old one has ended.
        max_surge_percent: 0
        ray_actor_options:
          num_cpus: 1
          resources:
            milliways_ingress: 1
{{- end }}

{{/* Equal requests and limits; takes `resources` and `gpus`. */}}
{{- define "milliways.resources" -}}
{{- $all := dict "cpu" .resources.cpu "memory" .resources.memory }}
{{- if .gpus }}
{{- $all = set $all "nvidia.com/gpu" (toString .gpus) }}
{{- end -}}
requests:
  {{- toYaml $all | nindent 2 }}
limits:
  {{- toYaml $all | nindent 2 }}
{{- end }}

{{/* A pod of a role; takes `root`, `role`, `gpus` and `body`, the rest of its container. */}}
{{- define "milliways.pod" -}}
{{- $pod := index .root.Values.pods .role }}
metadata:
  labels:
    {{- include "milliways.selector" . | nindent 4 }}
spec:
  {{- if ne .role "head" }}
  automountServiceAccountToken: false
  {{- end }}
  {{- if eq .role "ingress" }}
  # Running streams have ingress.grace_s to end when the pod must stop, and then their last errors.
  terminationGracePeriodSeconds: {{ add 30 (int (dig "ingress" "grace_s" 120 .root.Values.config)) }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    seccompProfile:
      type: RuntimeDefault
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $pod.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pod.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ if eq .role "head" }}ray-head{{ else }}ray-worker{{ end }}
      image: {{ .root.Values.image.repository }}:{{ .root.Values.image.tag }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      resources:
        {{- include "milliways.resources" (dict "resources" $pod.resources "gpus" .gpus) | nindent 8 }}
      {{- .body | nindent 6 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: model, mountPath: {{ .root.Values.config.model.path }}, readOnly: true}
        {{- if .root.Values.tls.secretName }}
        - {name: tls, mountPath: /etc/milliways/tls, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $pod.shm }}}}
    - name: model
      persistentVolumeClaim: {claimName: {{ .root.Values.model.claimName }}, readOnly: true}
    {{- if .root.Values.tls.secretName }}
    - name: tls
      secret: {secretName: {{ .root.Values.tls.secretName }}, defaultMode: 0444}
    {{- end }}
{{- end }}

{{/* HTTP probes, because KubeRay's own probes call wget, which the image does not have. */}}
{{- define "milliways.liveness" -}}
livenessProbe:
  httpGet: {path: {{ .path }}, port: {{ .port }}}
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
{{- end }}

{{- define "milliways.readiness" -}}
readinessProbe:
  httpGet: {path: {{ .path }}, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
