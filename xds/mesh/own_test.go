package mesh

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

func TestOwnExtension(t *testing.T) {
	x, err := proto.Marshal(&ambit.WorkloadExtension{
		SameNode: ambit.WorkloadExtension_SAME_NODE_LOCAL, AccessLog: ambit.WorkloadExtension_ACCESS_LOG_FAILURES,
		Terminating: true, DnsNames: []string{"Web-0.web.ns.svc.cluster.local."}, StrictBy: "ns/strict",
	})
	if err != nil {
		t.Fatal(err)
	}
	in := func(name, url string, value []byte) *workload.Workload {
		return &workload.Workload{Uid: "u", Extensions: []*workload.Extension{{Name: name, Config: &anypb.Any{TypeUrl: url, Value: value}}}}
	}
	w, err := DecodeWorkload(in(api.WorkloadExtension, api.WorkloadExtensionType, x))
	if err != nil {
		t.Fatal(err)
	}
	if w.SameNode != ambit.WorkloadExtension_SAME_NODE_LOCAL || w.AccessLog != ambit.WorkloadExtension_ACCESS_LOG_FAILURES ||
		!w.Terminating || w.StrictBy != "ns/strict" || len(w.DNSNames) != 1 || w.DNSNames[0] != "web-0.web.ns.svc.cluster.local" {
		t.Errorf("decoded %+v", w)
	}
	w, err = DecodeWorkload(in("example.com/other", api.WorkloadExtensionType, x))
	if err != nil || w.Terminating {
		t.Errorf("another's extension: %v, terminating %v", err, w.Terminating)
	}
	if _, err := DecodeWorkload(in(api.WorkloadExtension, api.WorkloadExtensionType, []byte{0xff})); err == nil {
		t.Error("garbage in our own extension was accepted")
	}
}
