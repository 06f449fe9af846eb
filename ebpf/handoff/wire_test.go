package handoff_test

import (
	"encoding/hex"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api/zds"
)

// These bytes are what other agents and proxies send and expect. Our own two ends
// agree with each other whatever the field numbers are; only the bytes tell.
func TestMessagesHaveTheBytesOfTheField(t *testing.T) {
	tests := []struct {
		name string
		msg  proto.Message
		want string
	}{
		{"hello", &zds.ZdsHello{Version: zds.Version_V1}, "0801"},
		{"add", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{Uid: "u",
			WorkloadInfo: &zds.WorkloadInfo{Name: "n", Namespace: "s", ServiceAccount: "a"}}}}, "0a0e" + "0a0175" + "1209" + "0a016e" + "120173" + "1a0161"},
		{"keep", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Keep{Keep: &zds.KeepWorkload{Uid: "u"}}}, "2a03" + "0a0175"},
		{"del: the uid is field 2", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Del{Del: &zds.DelWorkload{Uid: "u"}}}, "1203" + "120175"},
		{"snapshot sent", &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_SnapshotSent{SnapshotSent: &zds.SnapshotSent{}}}, "1a00"},
		{"ack", &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &zds.Ack{Error: "e"}}}, "0a03" + "0a0165"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := proto.MarshalOptions{Deterministic: true}.Marshal(tt.msg)
			check(t, err)
			if got := hex.EncodeToString(b); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
