package dir

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/randfill"
)

// TestRandomObjectsDecodeAsJSON fills every kind at random, writes it as JSON,
// which is YAML, and reads it strictly: every field must be known and come back.
func TestRandomObjectsDecodeAsJSON(t *testing.T) {
	letters := []string{"a", "b-c", "x.y", "1", "true", "no", "~", "a b", "ü"}
	for i := range kinds {
		k := &kinds[i]
		if k.typ == nil {
			continue
		}
		t.Run(k.kind, func(t *testing.T) {
			fill := randfill.NewWithSeed(int64(i)).NilChance(0).NumElements(1, 2).MaxDepth(12).Funcs(
				func(s *string, c randfill.Continue) { *s = letters[c.Intn(len(letters))] },
				func(v *metav1.Time, c randfill.Continue) { *v = metav1.NewTime(time.Unix(int64(c.Int31()), 0).UTC()) },
				func(v *metav1.MicroTime, c randfill.Continue) {
					*v = metav1.NewMicroTime(time.Unix(int64(c.Int31()), 1000).UTC())
				},
				func(v *metav1.Duration, c randfill.Continue) { v.Duration = time.Duration(c.Int31()) },
				func(v *resource.Quantity, c randfill.Continue) {
					*v = *resource.NewMilliQuantity(int64(c.Int31()), resource.DecimalSI)
				},
				func(v *intstr.IntOrString, c randfill.Continue) {
					*v = intstr.FromInt32(c.Int31())
					if c.Bool() {
						*v = intstr.FromString("http")
					}
				},
				func(v *metav1.FieldsV1, c randfill.Continue) { v.SetRawBytes([]byte(`{"f:a":{}}`)) },
				func(v *runtime.RawExtension, c randfill.Continue) { v.Raw = []byte(`{"a":[1,null,"b"]}`) },
				func(v *any, c randfill.Continue) { *v = "x" },
			)
			for range 6 {
				want := reflect.New(k.typ)
				fill.Fill(want.Interface())
				text, err := json.Marshal(want.Interface())
				if err != nil {
					t.Fatal(err)
				}
				var doc yaml.Node
				if err := yaml.Unmarshal(text, &doc); err != nil {
					t.Fatal(err)
				}
				got, s := reflect.New(k.typ), &strict{}
				s.decode(doc.Content[0], got.Interface())
				for _, f := range s.faults {
					if len(f.Message) < 17 || f.Message[:17] != "unsupported value" { // random strings are no enum's values
						t.Errorf("%s: %s", f.Path, f.Message)
					}
				}
				again, err := json.Marshal(got.Interface())
				if err != nil {
					t.Fatal(err)
				}
				if len(s.faults) < maxFaults && string(again) != string(text) {
					t.Fatalf("read\n%s\nwritten\n%s", again, text)
				}
			}
		})
	}
}
