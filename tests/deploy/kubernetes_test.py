#!/usr/bin/env python3
"""Are the manifests of deploy/kubernetes valid, do they fit together, and do they fit the server?

    kubernetes_test.py SERVER MODEL      (make kubernetes-test)

Renders every overlay with kubectl's kustomize, validates each document against Kubernetes' own
schemas, follows every reference from one document to another, and starts the server with the
pods' environment to see that probes, metrics and the drain are what the manifests say. With
LATTE_IMAGE=NAME (an image that podman has) and LATTE_NETNS=NAME (a network namespace) the single
server is run from its manifest by `podman kube play`; kubernetes.sh makes both.
"""
import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from copy import deepcopy

import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy/kubernetes"
OVERLAYS = ("single", "replicas", "gpu")
VERSIONS = ("1.25.0", "1.31.0", "1.37.0")  # the first with all the API versions used, and later ones
APP = "app.kubernetes.io/name"
KEY = "a-key-of-the-test"

passed = failed = 0


def check(name, good, detail=""):
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
    print(f"{'ok    ' if good else 'FAILED'} {name}{'' if good or detail == '' else f': {detail}'}", flush=True)


# ---- rendering ---------------------------------------------------------------------------------


def kustomize(folder):
    return subprocess.run(["kubectl", "kustomize", str(folder)], text=True, capture_output=True)


def render(folder):
    """A copy of the manifests with keys of the test: {overlay: documents}."""
    copy = folder / "kubernetes"
    shutil.copytree(MANIFESTS, copy, ignore=shutil.ignore_patterns("*.txt"))
    result = kustomize(copy / "overlays/single")
    check("without a file of keys nothing is rendered, and the message names it",
          result.returncode and "api-keys.txt" in result.stderr, result.stderr)
    (copy / "base/api-keys.txt").write_text(KEY + "\n")
    (copy / "overlays/replicas/redis-password.txt").write_text("0123456789abcdef")
    rendered = {}
    for overlay in OVERLAYS:
        result = kustomize(copy / "overlays" / overlay)
        check(f"{overlay}: kustomize renders it", result.returncode == 0, result.stderr)
        rendered[overlay] = [d for d in yaml.safe_load_all(result.stdout) if d]
    (copy / "base/api-keys.txt").write_text("another-key\n")
    again = yaml.safe_load_all(kustomize(copy / "overlays/single").stdout)
    check("other keys make a pod of another name of Secret, so that it is replaced",
          pod_of(find(rendered["single"], "StatefulSet", "latte-server")) !=
          pod_of(find(list(again), "StatefulSet", "latte-server")))
    return rendered


def validate(overlay, documents):
    for version in VERSIONS:
        wrong = []
        for d in documents:
            try:
                kubernetes_validate.validate(d, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as e:
                wrong.append(f"{name_of(d)}: {getattr(e, 'message', e)}")
        check(f"{overlay}: {len(documents)} documents are valid for Kubernetes {version}", not wrong, wrong)


# ---- references --------------------------------------------------------------------------------


def name_of(d):
    return f"{d['kind']}/{d['metadata']['name']}"


def of_kind(documents, *kinds):
    return [d for d in documents if d["kind"] in kinds]


def find(documents, kind, name):
    return next((d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name), None)


def workloads(documents):
    return of_kind(documents, "Deployment", "StatefulSet")


def pod_of(workload):
    return workload["spec"]["template"]["spec"]


def selects(selector, workload):
    labels = workload["spec"]["template"]["metadata"]["labels"]
    return all(labels.get(k) == v for k, v in selector.items())


def port_names(workload):
    return {p["name"] for c in pod_of(workload)["containers"] for p in c.get("ports", [])}


def selector_faults(documents):
    for d in documents:
        spec = d.get("spec", {})
        ports = []
        if d["kind"] == "Service":
            selector = spec["selector"]
            ports = [p["targetPort"] for p in spec["ports"]]
        elif d["kind"] == "PodDisruptionBudget":
            selector = spec["selector"]["matchLabels"]
        elif d["kind"] == "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
            ports = [p["port"] for rule in spec.get("ingress", []) for p in rule["ports"]]
            yield from egress_faults(d, documents)
        else:
            continue
        chosen = [w for w in workloads(documents) if selects(selector, w)]
        if len(chosen) != 1:
            yield f"{name_of(d)} selects {[name_of(w) for w in chosen]}"
        for w in chosen:
            if not set(ports) <= port_names(w):
                yield f"{name_of(d)}: ports {ports}, {name_of(w)} has {port_names(w)}"


def egress_faults(policy, documents):
    """Named ports that a pod may call are those of the pods it may call."""
    for rule in policy["spec"].get("egress", []):
        for to in rule["to"]:
            if "namespaceSelector" in to:
                continue
            called = [w for w in workloads(documents) if selects(to["podSelector"]["matchLabels"], w)]
            if len(called) != 1 or not {p["port"] for p in rule["ports"]} <= port_names(called[0]):
                yield f"{name_of(policy)}: calls {[name_of(w) for w in called]} at {rule['ports']}"


def secrets_used(pod):
    for v in pod.get("volumes", []):
        if "secret" in v:
            yield v["secret"]["secretName"], None
    for c in pod["containers"]:
        for e in c.get("env", []):
            ref = e.get("valueFrom", {}).get("secretKeyRef")
            if ref:
                yield ref["name"], ref["key"]


def workload_faults(w, documents):
    pod = pod_of(w)
    if not selects(w["spec"]["selector"]["matchLabels"], w):
        yield "its selector does not match its pods"
    if w["kind"] == "StatefulSet" and not find(documents, "Service", w["spec"]["serviceName"]):
        yield "serviceName names no Service"
    for name, key in secrets_used(pod):
        secret = find(documents, "Secret", name)
        if not secret or key and key not in secret["data"]:
            yield f"no Secret {name} with {key}"
    account = pod.get("serviceAccountName")
    if account and not find(documents, "ServiceAccount", account):
        yield f"no ServiceAccount {account}"
    volumes = {v["name"] for v in pod.get("volumes", [])}
    volumes |= {c["metadata"]["name"] for c in w["spec"].get("volumeClaimTemplates", [])}
    for c in pod["containers"]:
        mounted = {m["name"] for m in c.get("volumeMounts", [])}
        if not mounted <= volumes:
            yield f"mounts {mounted - volumes}, which is no volume"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = c.get(kind, {}).get("httpGet", {}).get("port")
            if port and port not in port_names(w):
                yield f"{kind} at port {port}, which it does not have"


def restricted_faults(w):
    """The Pod Security Standard `restricted`, and a read-only root."""
    pod = pod_of(w)
    s = pod["securityContext"]
    if not s.get("runAsNonRoot") or not s.get("runAsUser") or s.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"pod: {s}"
    if pod.get("automountServiceAccountToken") is not False or pod.get("enableServiceLinks") is not False:
        yield "it has the API's token, or its neighbours' variables"
    for c in pod["containers"]:
        if c.get("securityContext") != {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                        "capabilities": {"drop": ["ALL"]}}:
            yield f"container: {c.get('securityContext')}"
        if "memory" not in c["resources"]["limits"] or "cpu" not in c["resources"]["requests"]:
            yield f"resources: {c['resources']}"
    if any("hostPath" in v for v in pod.get("volumes", [])) or pod.get("hostNetwork"):
        yield "it reaches into the host"


def environment(container):
    return {e["name"]: e.get("value") for e in container["env"]}


def drain_faults(w):
    """Less time than the server takes to end would cut requests off."""
    pod = pod_of(w)
    container = pod["containers"][0]
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = int(environment(container)["LATTE_DRAIN_TIMEOUT"])
    probe = container["readinessProbe"]
    if pod["terminationGracePeriodSeconds"] <= pre_stop_s + drain_s:
        yield f"grace {pod['terminationGracePeriodSeconds']} s for {pre_stop_s} + {drain_s} s"
    if pre_stop_s < 5:
        yield "preStop is too short for balancers to hear of the end"
    if probe["periodSeconds"] * probe["failureThreshold"] > 15:
        yield "a server that is not ready keeps getting requests for too long"


def check_references(overlay, documents):
    faults = list(selector_faults(documents))
    check(f"{overlay}: Services, policies and budgets select pods that have their ports", not faults, faults)
    for w in workloads(documents):
        faults = list(workload_faults(w, documents)) + list(restricted_faults(w))
        check(f"{overlay}: {name_of(w)} refers to what is there, and is restricted", not faults, faults)
    server = next(w for w in workloads(documents) if w["metadata"]["name"] == "latte-server")
    faults = list(drain_faults(server))
    check(f"{overlay}: the grace period is longer than preStop and drain", not faults, faults)
    container = pod_of(server)["containers"][0]
    port = container["ports"][0]["containerPort"]
    annotated = server["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"]
    check(f"{overlay}: one port everywhere", str(port) == environment(container)["LATTE_PORT"] == annotated)
    kinds = {d["kind"] for d in documents}
    wanted = {"Service", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "Secret", server["kind"]}
    if overlay != "single":
        wanted |= {"HorizontalPodAutoscaler"}
    check(f"{overlay}: nothing is missing", wanted <= kinds, wanted - kinds)
    store = environment(container)["LATTE_STORE"]
    if overlay == "single":
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        claims = {c["metadata"]["name"] for c in server["spec"]["volumeClaimTemplates"]}
        check("single: one replica, its store is on a claimed volume",
              server["spec"]["replicas"] == 1 and mounts.get(store) in claims, store)
    else:
        check_replicas(overlay, documents, server, store)


def check_replicas(overlay, documents, server, store):
    host = re.fullmatch(r"redis://:\$\(REDIS_PASSWORD\)@([a-z-]+):(\d+)/0", store)
    service = host and find(documents, "Service", host[1])
    check(f"{overlay}: the store is the Redis Service", service and
          [p["port"] for p in service["spec"]["ports"]] == [int(host[2])], store)
    names = [e["name"] for e in pod_of(server)["containers"][0]["env"]]
    check(f"{overlay}: the password stands before its use", names.index("REDIS_PASSWORD") < names.index("LATTE_STORE"))
    scaler = of_kind(documents, "HorizontalPodAutoscaler")[0]["spec"]
    target = scaler["scaleTargetRef"]
    check(f"{overlay}: the autoscaler scales the Deployment, which leaves the number to it",
          find(documents, target["kind"], target["name"]) is server and "replicas" not in server["spec"])


def check_alike(rendered):
    """The two workloads are written out twice; they may differ in the store and the spreading only."""
    single = pod_of(find(rendered["single"], "StatefulSet", "latte-server"))
    many = pod_of(find(rendered["replicas"], "Deployment", "latte-server"))
    for pod in (single, many):
        pod.pop("topologySpreadConstraints", None)
        c = pod["containers"][0]
        c["env"] = [e for e in c["env"] if e["name"] not in ("LATTE_STORE", "REDIS_PASSWORD")]
        c["volumeMounts"] = [m for m in c["volumeMounts"] if m["name"] != "store"]
    check("the pods of single and replicas differ in the store only", single == many)


def check_gpu(documents):
    container = pod_of(find(documents, "Deployment", "latte-server"))["containers"][0]
    check("gpu: one GPU as a limit, the CUDA image, and no falling back to the CPU",
          container["resources"]["limits"]["nvidia.com/gpu"] == "1" and "cuda" in container["image"]
          and environment(container)["LATTE_DEVICE"] == "cuda")


# ---- the server --------------------------------------------------------------------------------


def get(url, key=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
    except OSError as e:
        return 0, str(e)


def await_status(url, status, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if get(url)[0] == status:
            return True
        time.sleep(0.3)
    return False


def check_options(program, rendered):
    known = set(re.findall(r"\bLATTE_[A-Z_]+", subprocess.run(
        [program, "--help"], text=True, capture_output=True).stdout))
    used = {e["name"] for documents in rendered.values() for w in workloads(documents)
            for c in pod_of(w)["containers"] for e in c["env"] if e["name"].startswith("LATTE_")}
    check("the variables are options of the server", used and used <= known, used - known)


@contextlib.contextmanager
def server_of(program, model, container, folder):
    """The server with the pod's environment; only addresses and paths are the test's."""
    (folder / "keys").write_text(KEY + "\n")
    own = {"LATTE_HOST": "127.0.0.1", "LATTE_PORT": "0", "LATTE_API_KEY_FILE": str(folder / "keys"),
           "LATTE_STORE": str(folder / "store"), "LATTE_MODEL": model}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([program], env={**os.environ, **environment(container), **own},
                                   stdout=log, stderr=log)
    try:
        yield process, folder / "log"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def await_url(log):
    for _ in range(100):
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found.group()
        time.sleep(0.2)
    raise SystemExit("the server names no port")


def check_server(program, model, rendered, folder):
    container = pod_of(find(rendered["single"], "StatefulSet", "latte-server"))["containers"][0]
    paths = {k: container[k]["httpGet"]["path"] for k in ("startupProbe", "readinessProbe", "livenessProbe")}
    with server_of(program, model, container, folder) as (process, log):
        url = await_url(log)
        check("the liveness probe is green from the start", get(url + paths["livenessProbe"])[0] == 200)
        check("the startup probe becomes green", await_status(url + paths["startupProbe"], 200, 120))
        check("the readiness probe is green then", get(url + paths["readinessProbe"])[0] == 200)
        check("the API wants a key of the Secret, the probes do not",
              (get(url + "/v1/models")[0], get(url + "/v1/models", KEY)[0]) == (401, 200))
        check_scaling(rendered["replicas"], get(url + "/metrics")[1])
        process.send_signal(signal.SIGTERM)
        check("SIGTERM ends it with 0 within the grace period", process.wait(60) == 0)


def check_scaling(documents, exposition):
    """From a series of the server through the adapter's rule to the autoscaler's metric."""
    wanted = of_kind(documents, "HorizontalPodAutoscaler")[0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    rule = yaml.safe_load((MANIFESTS / "overlays/replicas/prometheus-adapter.yaml").read_text())["rules"][0]
    series = re.match(r"[a-z_]+", rule["seriesQuery"]).group()
    check("the adapter's series is a gauge that the server exports", f"# TYPE {series} gauge\n" in exposition, series)
    match = re.match(rule["name"]["matches"], series)
    check("the adapter's rule yields the autoscaler's metric",
          match and rule["name"]["as"].replace("${1}", match.group(1)) == wanted, wanted)
    scrape = yaml.safe_load((MANIFESTS / "overlays/replicas/scrape-config.yaml").read_text())["scrape_configs"][0]
    labels = {r["target_label"] for r in scrape["relabel_configs"] if "target_label" in r}
    check("the scrape job gives the labels that the rule asks for", labels == set(rule["resources"]["overrides"]))


def check_queries(folder):
    rule = yaml.safe_load((MANIFESTS / "overlays/replicas/prometheus-adapter.yaml").read_text())["rules"][0]
    query = (rule["metricsQuery"].replace("<<.Series>>", "latte_requests_waiting")
             .replace("<<.LabelMatchers>>", 'namespace="n",pod=~"a|b"').replace("<<.GroupBy>>", "pod"))
    rules = {"groups": [{"name": "adapter", "rules": [{"record": "x", "expr": query}]}]}
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [{
        "interval": "15s",
        "input_series": [{"series": 'latte_requests_waiting{namespace="n",pod="a"}', "values": "0 9 0 2"},
                         {"series": 'latte_requests_waiting{namespace="n",pod="b"}', "values": "1x3"},
                         {"series": 'latte_requests_waiting{namespace="other",pod="a"}', "values": "70x3"}],
        "promql_expr_test": [{"expr": query, "eval_time": "45s", "exp_samples": [
            {"labels": '{pod="a"}', "value": 9}, {"labels": '{pod="b"}', "value": 1}]}]}]}
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    (folder / "tests.yml").write_text(yaml.safe_dump(tests))
    r = promtool("test", "rules", folder / "tests.yml")
    check("the adapter's query gives the most of a minute by pod", r.returncode == 0, r.stdout + r.stderr)
    check_relabelling(folder)


def promtool(*arguments):
    return subprocess.run(["promtool", *map(str, arguments)], text=True, capture_output=True)


def check_relabelling(folder):
    """Debian's Prometheus is built without Kubernetes: its pods are given here, by the labels that it has for them."""
    scrape = yaml.safe_load((MANIFESTS / "overlays/replicas/scrape-config.yaml").read_text())
    job = scrape["scrape_configs"][0]
    check("the scrape job looks for pods", job.pop("kubernetes_sd_configs") == [{"role": "pod"}])

    def pod(address, app, port):
        return {"targets": [address], "labels": {
            "__meta_kubernetes_namespace": "n", "__meta_kubernetes_pod_name": f"{app}-0",
            "__meta_kubernetes_pod_label_app_kubernetes_io_name": app,
            "__meta_kubernetes_pod_container_port_name": port}}

    job["static_configs"] = [pod("10.0.0.1:8080", "latte-server", "http"),
                             pod("10.0.0.2:6379", "latte-redis", "redis")]
    (folder / "scrape.yml").write_text(yaml.safe_dump(scrape))
    r = promtool("check", "service-discovery", folder / "scrape.yml", "latte")
    kept = [t["labels"] for t in json.loads(r.stdout[r.stdout.index("["):]) if t["labels"]]
    check("it keeps the servers alone, and names namespace and pod",
          [(k["__address__"], k["namespace"], k["pod"]) for k in kept] == [("10.0.0.1:8080", "n", "latte-server-0")],
          r.stdout + r.stderr)


# ---- podman ------------------------------------------------------------------------------------


def playable(documents, image, port):
    """What podman knows: the StatefulSet's pod, its claim, and its Secret; a port of this machine."""
    workload = deepcopy(find(documents, "StatefulSet", "latte-server"))
    pod = pod_of(workload)
    claim = workload["spec"]["volumeClaimTemplates"][0]
    name = claim["metadata"]["name"]
    container = pod["containers"][0]
    container.update(image=image, imagePullPolicy="Never")
    container["ports"][0]["hostPort"] = port
    for v in pod["volumes"]:
        v["secret"]["optional"] = False  # podman 4.3 ends with a null pointer where this is left out
    pod["volumes"].append({"name": name, "persistentVolumeClaim": {"claimName": f"latte-test-{name}"}})
    return [
        find(documents, "Secret", next(secrets_used(pod))[0]),
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": f"latte-test-{name}"},
         "spec": claim["spec"]},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "latte-kubernetes-test",
         "labels": workload["spec"]["template"]["metadata"]["labels"]}, "spec": pod}]


def in_net(*command):
    """In the network namespace of containers.sh."""
    return subprocess.run(["nsenter", f"--net=/run/netns/{os.environ['LATTE_NETNS']}", *command],
                          text=True, capture_output=True, timeout=300)


def curl(url, key=None):
    headers = ["-H", f"Authorization: Bearer {key}"] if key else []
    return in_net("curl", "-s", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", *headers, url).stdout


def podman(*arguments):
    return in_net("podman", *arguments)


def check_play(documents, image, folder):
    secret, claim, pod = playable(documents, image, 8080)
    name, url = f"{pod['metadata']['name']}-latte-server", "http://127.0.0.1:8080"
    (folder / "play.yaml").write_text(yaml.safe_dump_all([secret, claim, pod]))
    r = podman("kube", "play", str(folder / "play.yaml"))
    check("podman kube play runs the single server", r.returncode == 0, r.stdout + r.stderr)
    end = time.monotonic() + 120
    while curl(url + "/health/ready") != "200" and time.monotonic() < end:
        time.sleep(1)
    check("play: the server becomes ready", curl(url + "/health/ready") == "200", podman("logs", name).stderr[-2000:])
    # podman 4.3 leaves a Secret in the base64 of its manifest (containers/podman#16625).
    key = podman("exec", name, "cat", "/etc/latte/keys").stdout.strip()
    check("play: the Secret's key is in its file", key in (KEY, base64.b64encode(f"{KEY}\n".encode()).decode()), key)
    codes = curl(url + "/v1/models"), curl(url + "/v1/models", "not-" + key), curl(url + "/v1/models", key)
    check("play: the server knows it, and no other", codes == ("401", "401", "200"), codes)
    facts = podman("exec", name, "sh", "-c",
                   "id -u; touch /x 2>/dev/null && echo writable; ls /var/lib/latte | wc -l")
    check("play: user 10001, a read-only root, files in the volume",
          re.fullmatch(r"10001\n[1-9]\d*\n", facts.stdout), facts.stdout + facts.stderr)
    r = podman("pod", "stop", "-t", "60", pod["metadata"]["name"])
    code = podman("inspect", name, "--format", "{{.State.ExitCode}}").stdout.strip()
    check("play: SIGTERM ends it with 0", code == "0", code + r.stderr)
    r = podman("kube", "down", str(folder / "play.yaml"))
    check("play: podman kube down removes it", r.returncode == 0, r.stdout + r.stderr)


# ---- all ---------------------------------------------------------------------------------------


def main():
    program, model = sys.argv[1:3]
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="kubernetes-test-") as name:
        folder = pathlib.Path(name)
        rendered = render(folder)
        for overlay, documents in rendered.items():
            validate(overlay, documents)
            check_references(overlay, documents)
        check_gpu(rendered["gpu"])
        check_options(program, rendered)
        check_server(program, str(pathlib.Path(model).resolve()), rendered, folder)
        check_queries(folder)
        image = os.environ.get("LATTE_IMAGE")
        if image:
            check_play(rendered["single"], image, folder)
        else:
            print("SKIPPED podman kube play: no LATTE_IMAGE")
        check_alike(rendered)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
