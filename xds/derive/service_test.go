package derive

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/dir"
)

// TestTrafficPolicies is the table of how fields and annotations of a Service
// become its load balancing, each row one that Istio's users know.
func TestTrafficPolicies(t *testing.T) {
	local, cluster := corev1.ServiceInternalTrafficPolicyLocal, corev1.ServiceInternalTrafficPolicyCluster
	const (
		zone = "mode=FAILOVER NETWORK REGION ZONE"
		node = "mode=FAILOVER NETWORK REGION ZONE SUBZONE NODE"
	)
	tests := []struct {
		name                string
		spec                corev1.ServiceSpec
		own, ofNs           string // annotation of the service and of its namespace
		want, wantCondition string
	}{
		{name: "nothing", want: ""},
		{name: "internal policy Cluster", spec: corev1.ServiceSpec{InternalTrafficPolicy: &cluster}, want: ""},
		{name: "internal policy Local", spec: corev1.ServiceSpec{InternalTrafficPolicy: &local}, want: "mode=STRICT NODE"},
		{name: "Local is stricter than a preference", spec: corev1.ServiceSpec{InternalTrafficPolicy: &local, TrafficDistribution: new("PreferClose")}, want: "mode=STRICT NODE"},
		{name: "PreferClose", spec: corev1.ServiceSpec{TrafficDistribution: new("PreferClose")}, want: zone},
		{name: "PreferSameZone", spec: corev1.ServiceSpec{TrafficDistribution: new("PreferSameZone")}, want: zone},
		{name: "PreferSameNode", spec: corev1.ServiceSpec{TrafficDistribution: new("PreferSameNode")}, want: node},
		{name: "annotation", own: "PreferSameNode", want: node},
		{name: "annotation in any case", own: "preferclose", want: zone},
		{name: "annotation of the namespace", ofNs: "PreferSameZone", want: zone},
		{name: "its own annotation beats the namespace's", own: "PreferSameNode", ofNs: "PreferClose", want: node},
		{name: "the field beats annotations", spec: corev1.ServiceSpec{TrafficDistribution: new("PreferClose")}, own: "PreferSameNode", ofNs: "PreferSameNode", want: zone},
		{name: "any opts out of the namespace's", own: "any", ofNs: "PreferClose", want: ""},
		{name: "a slip in the annotation", own: "PreferNear", want: "", wantCondition: `annotation networking.istio.io/traffic-distribution: "PreferNear"`},
		{name: "a slip in the field", spec: corev1.ServiceSpec{TrafficDistribution: new("Close")}, want: "", wantCondition: `spec.trafficDistribution: "Close"`},
		{name: "a slip hides behind the field", spec: corev1.ServiceSpec{TrafficDistribution: new("PreferClose")}, own: "PreferNear", want: zone},
		{name: "a slip of the namespace", ofNs: "PreferNear", want: "", wantCondition: `annotation networking.istio.io/traffic-distribution: "PreferNear"`},
		{name: "session affinity", spec: corev1.ServiceSpec{SessionAffinity: corev1.ServiceAffinityClientIP}, want: "", wantCondition: "spec.sessionAffinity ClientIP"},
		{name: "not ready ones too", spec: corev1.ServiceSpec{PublishNotReadyAddresses: true}, want: "health=ALLOW_ALL"},
		{name: "not ready ones, near", spec: corev1.ServiceSpec{PublishNotReadyAddresses: true, TrafficDistribution: new("PreferClose")}, want: "health=ALLOW_ALL " + zone},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "s", Annotations: map[string]string{}}, Spec: tt.spec}
			s.Spec.ClusterIP = "10.0.0.1"
			ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n", Annotations: map[string]string{}}}
			if tt.own != "" {
				s.Annotations[trafficDistributionAnnotation] = tt.own
			}
			if tt.ofNs != "" {
				ns.Annotations[trafficDistributionAnnotation] = tt.ofNs
			}
			e := New(Config{})
			r := e.Apply(dir.Change{Upserts: []*dir.Object{object("Namespace", "", "n", ns), object("Service", "n", "s", s)}})
			var got *workload.Service
			for _, u := range r.Upserts {
				if a, ok := u.Message.(*workload.Address); ok {
					got = a.GetService()
				}
			}
			if got == nil || !got.Canonical {
				t.Fatalf("no canonical service was sent: %v", names(r.Upserts))
			}
			if have := balancing(got.LoadBalancing); have != tt.want {
				t.Errorf("got %q, want %q:\n%s", have, tt.want, golden.Proto(got))
			}
			text := ""
			for _, c := range r.Status {
				text += c.Message
			}
			if (text == "") != (tt.wantCondition == "") || !strings.Contains(text, tt.wantCondition) {
				t.Errorf("condition %q, want %q", text, tt.wantCondition)
			}
		})
	}
}

func balancing(lb *workload.LoadBalancing) string {
	var parts []string
	if lb.GetHealthPolicy() != workload.LoadBalancing_ONLY_HEALTHY {
		parts = append(parts, "health="+lb.GetHealthPolicy().String())
	}
	if lb.GetMode() != workload.LoadBalancing_UNSPECIFIED_MODE {
		parts = append(parts, "mode="+lb.GetMode().String())
	}
	for _, s := range lb.GetRoutingPreference() {
		parts = append(parts, s.String())
	}
	return strings.Join(parts, " ")
}

// What an annotation exports to, as far as node proxies tell namespaces apart.
func TestExportTo(t *testing.T) {
	for value, want := range map[string]struct {
		visibility workload.Service_Visibility
		said       bool
	}{
		"":     {workload.Service_PUBLIC, false},
		"*":    {workload.Service_PUBLIC, false},
		".":    {workload.Service_NAMESPACE, false},
		"a,b":  {workload.Service_PUBLIC, true},
		"~":    {workload.Service_PUBLIC, true},
		". ":   {workload.Service_NAMESPACE, false},
		"some": {workload.Service_PUBLIC, true},
	} {
		o := testService("n", "s", "a", 1)
		o.Value.(*corev1.Service).Annotations = map[string]string{exportToAnnotation: value}
		e := New(Config{})
		r := e.Apply(dir.Change{Upserts: []*dir.Object{o}})
		s, _ := e.service(nn{"n", "s"})
		if s.Visibility != want.visibility || (len(r.Status) > 0) != want.said {
			t.Errorf("%q: %v, conditions %v", value, s.Visibility, r.Status)
		}
	}
}

// An alias is not in the mesh, so what its labels ask for cannot be.
func TestAliasHasNoWaypoint(t *testing.T) {
	o := labelled(testService("n", "s", "a", 1), useWaypointLabel, "wp")
	o.Value.(*corev1.Service).Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.com"}
	e := New(Config{})
	r := e.Apply(dir.Change{Upserts: []*dir.Object{o, testWaypoint("n", "wp", 15008)}})
	if c := r.Status[len(r.Status)-1]; c.Kind != "Service" || c.Status != "False" || !strings.Contains(c.Message, "ExternalName") {
		t.Errorf("conditions %v", r.Status)
	}
}

func TestAccessLogFilters(t *testing.T) {
	for expression, want := range map[string]struct {
		log accessLog
		ok  bool
	}{
		`response.code >= 400`:                            {logFailures, true},
		`response.code>=400`:                              {logFailures, true},
		`(response.code >= 400)`:                          {logFailures, true},
		`response.flags != 0`:                             {logFailures, true},
		`response.flags > 0 || response.code >= 400`:      {logFailures, true},
		`(response.flags > 0) || (response.code >= 400)`:  {logFailures, true},
		`connection.response_flags != "-"`:                {logFailures, true},
		`connection.response_flags != '-'`:                {logFailures, true},
		`has(connection.termination_details)`:             {logFailures, true},
		`true`:                                            {logAll, true},
		`false`:                                           {logOff, true},
		`response.code >= 500`:                            {logAll, false},
		`response.code < 400`:                             {logAll, false},
		`response.code >= 400 && connection.mtls`:         {logAll, false},
		`response.code >= 400 || request.method == "GET"`: {logAll, false},
		`!(response.code >= 400)`:                         {logAll, false},
		`(response.code >= 400) && (response.flags != 0)`: {logAll, false},
		`connection.mtls`:                                 {logAll, false},
		`((`:                                              {logAll, false},
		`()`:                                              {logAll, false},
		`(`:                                               {logAll, false},
		``:                                                {logAll, false},
		`xds.cluster_name == "x"`:                         {logAll, false},
		`response.code >= 400 ||`:                         {logAll, false},
		`(response.code >= 400 || response.flags != 0)`:                       {logFailures, true},
		`((response.code >= 400) || (response.flags != 0))`:                   {logFailures, true},
		`(response.code >= 400) || request.headers["a"] == "(response.flags"`: {logAll, false},
	} {
		if log, ok := filterMeaning(expression); log != want.log || ok != want.ok {
			t.Errorf("%s: %v, %v", expression, log, ok)
		}
	}
}
