package spelling

import (
	"encoding/json"
	"testing"
)

func TestCheck(t *testing.T) {
	type doc struct {
		Name string   `json:"name"`
		Size uint64   `json:"size"`
		List []string `json:"list"`
	}
	for text, good := range map[string]bool{
		`{"name":"a","size":1,"list":["x"]}`:                  true,
		` { "list": ["x"], "name": "a", "size": 1 } `:         true, // places and white space differ
		`{"name":"a","size":1,"list":null}`:                   true,
		`{"name":"a","size":1,"list":["x"],"more":1}`:         false,
		`{"name":"b","name":"a","size":1,"list":["x"]}`:       false,
		`{"Name":"a","size":1,"list":["x"]}`:                  false,
		`{"name":"a","NAME":"b","size":1,"list":["x"]}`:       false,
		`{"name":"a","size":1}`:                               false,
		`{"name":"a","size":null,"list":["x"]}`:               false,
		`{"size":1,"name":"\u0061","list":["x"]}`:             false, // longer than it is printed
		`{"size":1,"list":["x","y"],"name":"a","list":["x"]}`: false,
	} {
		var d doc
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if err := Check([]byte(text), &d); (err == nil) != good {
			t.Errorf("%s: %v", text, err)
		}
	}
}
